import pytest
import torch

from clmerge.merging import MagMax, Pipeline, Quantise

TAU = {"w": torch.randn(7, 9, generator=torch.Generator().manual_seed(0)), "empty": torch.zeros(0, 3)}


def test_one_bit_is_the_nearest_tensor_of_one_magnitude():
    signs = Quantise(1)(TAU)["w"]
    assert torch.equal(signs.sign(), TAU["w"].sign())
    assert signs.abs().unique().item() == pytest.approx(TAU["w"].abs().double().mean().item(), rel=1e-7)
    error = (signs - TAU["w"]).norm()
    for factor in (0.99, 1.01):
        assert (signs * factor - TAU["w"]).norm() > error


def test_eight_bits_are_near():
    rounded = Quantise(8)(TAU)["w"]
    step = TAU["w"].abs().max() / 127
    assert (rounded - TAU["w"]).abs().max() <= step * 0.5001
    assert torch.equal((rounded / step).round(), (TAU["w"] / step).round())


@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_scalars_and_dtypes(bits, dtype):
    vector = {"zero": torch.zeros(3, 5, dtype=dtype), "scalar": torch.tensor(-2.0, dtype=dtype), **TAU}
    rounded = Quantise(bits)(vector)
    assert not rounded["zero"].any()
    assert rounded["scalar"].item() == pytest.approx(-2.0)
    assert rounded["scalar"].dtype == rounded["zero"].dtype == dtype
    assert rounded["empty"].shape == (0, 3)


def test_zeros_beside_others_keep_eight_bits_but_not_one():
    vector = {"w": torch.tensor([3.0, 0.0, -3.0])}
    assert Quantise(8)(vector)["w"].tolist() == pytest.approx([3.0, 0.0, -3.0])
    assert Quantise(1)(vector)["w"].tolist() == [2.0, -2.0, -2.0]


def test_any_rule_merges_what_is_left():
    merger = Pipeline(MagMax(1.0), sparsifier=Quantise(1))
    merger.update({"w": torch.tensor([1.0, -3.0])})
    merger.update({"w": torch.tensor([-1.0, 1.0])})
    assert merger.compute()["w"].tolist() == [2.0, -2.0]


def test_bits_are_checked():
    with pytest.raises(ValueError, match="1 or 8 bits, got 4"):
        Quantise(4)
