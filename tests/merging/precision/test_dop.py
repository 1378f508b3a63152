import numpy as np
import pytest
import torch
from support.references import Case

from clmerge.merging import DOP
from clmerge.merging.precision.dop import shortest


def dop(num_steps, lr, alpha, beta, energy):
    """Full projectors and their exact gradients, where the rule has factors."""

    def projectors(matrix):
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        used = np.where(np.cumsum(s) < energy * s.sum(), s**2, 0)
        return u @ np.diag(used) @ u.T, vh.T @ np.diag(used) @ vh

    def optimised(models):
        spaces = [projectors(model) for model in models]
        x, weight = np.mean(models, axis=0), alpha
        first, second = np.zeros_like(x), np.zeros_like(x)
        for step in range(1, num_steps + 1):
            gaps = [x - model for model in models]
            grads = [2 * (p @ gap + gap @ q) for gap, (p, q) in zip(gaps, spaces, strict=True)]
            losses = [(gap * grad).sum() / 2 for gap, grad in zip(gaps, grads, strict=True)]
            g, h = (grad / loss if loss > 0 else grad for grad, loss in zip(grads, losses, strict=True))
            inner = (g * h).sum()
            if inner >= (g * g).sum():
                best = 0.999
            elif inner >= (h * h).sum():
                best = 0.001
            else:
                best = ((h - g) * h).sum() / ((g - h) ** 2).sum()
            weight = beta * weight + (1 - beta) * best
            grad = weight * grads[0] + (1 - weight) * grads[1]
            first = 0.9 * first + 0.1 * grad
            second = 0.999 * second + 0.001 * grad**2
            x = x - lr * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        return x

    def batch(vectors, tasks):
        merged = vectors[0]
        for vector in vectors[1:]:
            pairs = {name: [merged[name], tau] for name, tau in vector.items()}
            merged = {
                name: optimised(pair) if pair[0].ndim == 2 and pair[0].size else (pair[0] + pair[1]) / 2
                for name, pair in pairs.items()
            }
        return merged

    return batch


CASES = {
    "DOP": Case(
        lambda: DOP(20),
        dop(20, 1e-4, 0.8, 0.999, 0.99999),
        homogeneous=False,
        generic=True,
        condition=100,
    ),
    "DOP adaptive": Case(
        lambda: DOP(10, lr=1e-2, alpha=0.5, beta=0.5, energy=0.9),
        dop(10, 1e-2, 0.5, 0.5, 0.9),
        homogeneous=False,
        generic=True,
        condition=1000,
    ),
}


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
