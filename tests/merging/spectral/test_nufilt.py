import numpy as np
import pytest
import torch
from support.references import Case

from clmerge.merging import NuFilt


def leading(matrix, count):
    _, s, vh = np.linalg.svd(matrix)
    return vh[: min(count, int((s > 1e-6 * s[0]).sum()))].T


def nufilt(kept, new, ridge, scale):
    def matrix(taus):
        merged = taus[0]
        size = merged.shape[1]
        for tau in taus[1:]:
            past, mine = (leading(m, max(1, round(n * size))) for m, n in ((merged, kept), (tau, new)))
            projector = np.eye(size) - past @ past.T
            rest = (tau @ past @ past.T - merged) @ mine
            outside = projector @ mine
            inverse = np.linalg.inv(outside.T @ outside + ridge * np.eye(mine.shape[1])) @ outside.T
            merged = merged + tau @ projector + rest @ inverse
        return merged

    def batch(vectors, tasks):
        found = {}
        for name, first in vectors[0].items():
            taus = [vector[name] for vector in vectors]
            found[name] = scale * (matrix(taus) if first.ndim == 2 and first.size else np.mean(taus, axis=0))
        return found

    return batch


CASES = {
    "NuFilt": Case(NuFilt, nufilt(1 / 6, 1 / 96, 1e-4, 1.0), generic=True, condition=1000),
    "NuFilt wide": Case(
        lambda: NuFilt(0.5, 0.4, ridge=0.1, scale=0.5), nufilt(0.5, 0.4, 0.1, 0.5), generic=True, condition=1000
    ),
}

GENERATOR = torch.Generator().manual_seed(0)


def matrices(count, outputs=12, inputs=16):
    return [torch.randn(outputs, inputs, generator=GENERATOR, dtype=torch.float64) for _ in range(count)]


def merged(merger, taus):
    for tau in taus:
        merger.update({"w": tau})
    return merger.compute()["w"]


def right(matrix, count):
    return torch.linalg.svd(matrix, full_matrices=False)[2][:count].t()


def test_protected_and_new_directions_both_answer_as_they_should():
    """The paper's loss, whose training is left out, is zero."""
    first, second, third = matrices(3)
    merger = NuFilt(0.25, 0.125, ridge=1e-13)
    before = merged(merger, [first, second])
    after = merged(merger, [third])
    past, mine = right(before, 4), right(third, 2)
    torch.testing.assert_close(after @ past, before @ past)
    torch.testing.assert_close(after @ mine, third @ mine)


def test_the_first_task_is_kept_and_so_is_one_that_comes_twice():
    (tau,) = matrices(1)
    torch.testing.assert_close(merged(NuFilt(), [tau]), tau)
    low = tau[:, :2] @ tau[:2]
    torch.testing.assert_close(merged(NuFilt(0.25, 0.125), [low, low]), low)


def test_tasks_with_other_inputs_are_added():
    one, other = matrices(2)
    one[:, 8:], other[:, :8] = 0, 0
    torch.testing.assert_close(merged(NuFilt(0.5, 0.25), [one, other]), one + other)


def test_a_direction_that_is_protected_is_not_blown_up():
    first, second = matrices(2)
    nearly = first[:, :] + 1e-7 * second
    change = merged(NuFilt(0.25, 0.125), [first, nearly]) - first
    assert change.norm() < 2 * first.norm()


@pytest.mark.parametrize("wrong", [{"kept": 1.5}, {"new": -0.1}, {"ridge": 0.0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NuFilt(**wrong)
