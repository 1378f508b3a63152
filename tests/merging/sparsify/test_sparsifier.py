import pytest
import torch

from clmerge.merging import RandomDrop, TrimModel, TrimTensor
from clmerge.merging.sparsify.sparsifier import drop_entries, keep_from, keep_largest
from clmerge.merging.threshold import Threshold, kth_largest_magnitude

GENERATOR = torch.Generator().manual_seed(0)
NORMAL = torch.randn(200, 500, generator=GENERATOR)
TIED = torch.randint(-3, 4, (200, 500), generator=GENERATOR).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entries_at_the_threshold_are_kept(dtype):
    tau = torch.tensor([1.0, -2.0, 2.0, -3.0], dtype=dtype)
    just_below = tau.nextafter(torch.zeros((), dtype=dtype))
    assert torch.equal(keep_from(tau, 2.0), torch.tensor([0.0, -2.0, 2.0, -3.0], dtype=dtype))
    assert torch.equal(keep_from(just_below, 2.0)[:3], torch.zeros(3, dtype=dtype))
    smallest = torch.tensor([1e-45, 0.0])
    assert torch.equal(keep_from(smallest, float(smallest[0])), smallest)


def test_nothing_is_aliased():
    tau = torch.ones(3)
    keep_from(tau, 0.0).zero_()
    keep_largest(tau, Threshold(1.0, 2)).zero_()
    assert tau.sum() == 3


@pytest.mark.parametrize("tau", [NORMAL, TIED, TIED.t(), NORMAL.double()], ids=["normal", "tied", "strided", "f64"])
@pytest.mark.parametrize("count", [1, 7, 20_000, 99_999, 100_000])
def test_keep_largest_keeps_the_first_of_equals(tau, count):
    flat = tau.reshape(-1)
    order = (-flat.abs()).argsort(stable=True)[:count]
    expected = torch.zeros_like(flat)
    expected[order] = flat[order]
    threshold = kth_largest_magnitude([tau], count)
    assert torch.equal(keep_largest(tau, threshold), expected.view(tau.shape))


def test_trim_model_sees_the_whole_model():
    vector = {"large": torch.tensor([10.0, 20.0]), "small": torch.tensor([1.0, 2.0])}
    trimmed = TrimModel(0.25)(vector)
    assert trimmed["large"].tolist() == [10.0, 20.0]
    assert trimmed["small"].tolist() == [0.0, 0.0]


def test_trim_model_keeps_everything_when_most_is_zero():
    vector = {"w": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, -0.25])}
    assert torch.equal(TrimModel(0.5)(vector)["w"], vector["w"])


def test_trim_tensor_keeps_at_least_one_entry():
    trimmed = TrimTensor(0.1)({"w": torch.tensor([1.0, -3.0, 2.0]), "empty": torch.zeros(0)})
    assert trimmed["w"].tolist() == [0.0, -3.0, 0.0]
    assert trimmed["empty"].shape == (0,)


@pytest.mark.parametrize("rescale", ["probability", "l1", "none"])
def test_random_drop_rescales_as_named(rescale):
    vector = {"w": NORMAL}
    kept = RandomDrop(0.75, rescale=rescale, seed=1)(vector, task=2)["w"]
    mask = kept != 0
    assert mask.float().mean().item() == pytest.approx(0.25, abs=0.01)
    factor = {"probability": 4.0, "l1": NORMAL.abs().sum() / NORMAL[mask].abs().sum(), "none": 1.0}[rescale]
    torch.testing.assert_close(kept[mask], NORMAL[mask] * factor)


def test_dropping_everything_of_a_tensor_gives_zeros():
    assert drop_entries(torch.ones(2), torch.zeros(2), 0.5, "l1").tolist() == [0.0, 0.0]


def test_masks_depend_on_seed_task_and_name_alone():
    ones = {name: torch.ones(1000) for name in ("a", "b")}
    drop = RandomDrop(0.5, rescale="none", seed=3)
    first = drop(ones, task=1)
    reversed_order = drop(dict(reversed(ones.items())), task=1)
    alone = drop({"b": ones["b"].double()}, task=1)
    for name in ones:
        assert torch.equal(first[name], reversed_order[name])
    assert torch.equal(first["b"].double(), alone["b"])
    others = [first["b"], drop(ones, task=2)["a"], RandomDrop(0.5, rescale="none", seed=4)(ones, task=1)["a"]]
    assert not any(torch.equal(first["a"], other) for other in others)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="density as a share"):
        TrimModel(0.0)
    with pytest.raises(ValueError, match="density as a share"):
        TrimTensor(1.5)
    with pytest.raises(ValueError, match=r"drop_rate in \[0, 1\)"):
        RandomDrop(1.0)
    with pytest.raises(ValueError, match="rescale 'probability'"):
        RandomDrop(0.5, rescale="l2")
