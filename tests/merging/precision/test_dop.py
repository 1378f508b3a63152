import pytest
import torch

from clmerge.merging import DOP
from clmerge.merging.precision.dop import shortest


def vectors(*shape, num_tasks=2, name="w"):
    generator = torch.Generator().manual_seed(0)
    return [{name: torch.randn(shape, generator=generator, dtype=torch.float64)} for _ in range(num_tasks)]


def merged(merger, taus):
    for tau in taus:
        merger.update(tau)
    return merger.compute()


def felt(x, tau):
    """How far a matrix is from a task's, where that task's singular vectors look."""
    return float((tau.t() @ (x - tau)).square().sum() + ((x - tau) @ tau.t()).square().sum())


def test_steps_lower_the_weighted_losses_below_those_of_the_mean():
    first, second = (tau["w"] for tau in vectors(6, 8))
    mean = (first + second) / 2
    found = merged(DOP(100, lr=1e-2, alpha=0.5, beta=1.0, energy=1.0), [{"w": first}, {"w": second}])["w"]
    assert felt(found, first) + felt(found, second) < 0.9 * (felt(mean, first) + felt(mean, second))


def test_alpha_decides_for_the_old_or_the_new_model():
    first, second = (tau["w"] for tau in vectors(6, 8))
    old, new = (
        merged(DOP(50, lr=1e-2, alpha=alpha, beta=1.0), [{"w": first}, {"w": second}])["w"] for alpha in (0.9, 0.1)
    )
    assert felt(old, first) < felt(new, first)
    assert felt(old, second) > felt(new, second)


def test_what_is_no_matrix_is_averaged_with_the_merged_one():
    taus = [{"b": torch.tensor([value])} for value in (4.0, 0.0, 1.0)]
    assert merged(DOP(), taus)["b"].item() == 1.5


def test_a_frozen_task_brings_no_nan():
    (tau,) = vectors(3, 4, num_tasks=1)
    zero = {"w": torch.zeros_like(tau["w"])}
    for stream in ([zero, tau], [tau, zero], [zero, zero]):
        assert torch.isfinite(merged(DOP(3), stream)["w"]).all()


def test_shortest_combination_of_gradients():
    assert shortest(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0])) == 0.999
    assert shortest(torch.tensor([3.0]), torch.tensor([1.0])) == 0.001
    assert shortest(torch.tensor([2.0]), torch.tensor([-2.0])) == 0.5


def test_a_fused_weight_can_be_merged_as_three():
    name = "attn.qkv.weight"
    taus = vectors(12, 4, name=name)
    parts = [
        merged(DOP(5), [{"w": tau[name][cut]} for tau in taus])["w"] for cut in (slice(4), slice(4, 8), slice(8, 12))
    ]
    torch.testing.assert_close(merged(DOP(5, split_qkv=True), taus)[name], torch.cat(parts))


@pytest.mark.parametrize("wrong", [{"num_steps": -1}, {"lr": 0.0}, {"alpha": 2.0}, {"beta": -1.0}, {"energy": 1.1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DOP(**wrong)
