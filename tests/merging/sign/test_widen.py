import numpy as np
import pytest
import torch
from support.references import Case, shapes_of, stacked, weights_of

from clmerge.merging import WIDEN


def scores(ranks, ratio, calibrated, count=1):
    """Softmax over the tasks; what is above the task's average is calibrated."""
    found = np.exp(ranks / count) / np.exp(ranks / count).sum(axis=0)
    above = ranks > ratio * ranks.reshape(len(ranks), -1).mean(axis=1).reshape(-1, *[1] * (ranks.ndim - 1))
    return np.where(above, calibrated, found)


def ranked(changes):
    return np.stack([np.argsort(np.argsort(row, kind="stable"), kind="stable") for row in changes])


def widen(ratio, calibrated):
    def batch(vectors, tasks):
        base, merged = weights_of(shapes_of(vectors)), {}
        for name, theta in base.items():
            taus = stacked(vectors, name)
            if theta.ndim == 2 and theta.size:
                models = theta + taus
                old, new = np.linalg.norm(theta, axis=0), np.linalg.norm(models, axis=1)
                length = np.abs(new - old)
                direction = 1 - (theta / old * models / new[:, None]).sum(axis=1)
                each = [
                    scores(ranked(change), ratio, calibrated, len(change[0]))[:, None] for change in (length, direction)
                ]
                merged[name] = (taus * sum(each) / 2).sum(axis=0)
            elif theta.size:
                merged[name] = (taus * scores(np.abs(taus), ratio, calibrated)).sum(axis=0)
            else:
                merged[name] = theta
        return merged

    return batch


CASES = {
    "WIDEN": Case(WIDEN, widen(1.0, 1.0), homogeneous=False, generic=True),
    "WIDEN strict": Case(lambda: WIDEN(1.5, calibrated=0.7), widen(1.5, 0.7), homogeneous=False, generic=True),
}


def merged(taus, theta, merger=None):
    merger = merger or WIDEN()
    for tau in taus:
        merger.update({"w": tau}, statistics={"weights": {"w": theta}})
    return merger.compute()["w"]


def test_a_column_that_only_grows_and_one_that_only_turns_are_told_apart():
    """Ranks of one task: the grown column is first in length, the turned one in direction; a third one is neither."""
    theta = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    tau = torch.tensor([[1.0, -0.4, 0.0], [0.0, 0.8, 0.0]])
    # length 1, 0, 0 and direction 0, 0.4, 0; alone, a task has softmax 1, so everything is kept
    torch.testing.assert_close(merged([tau], theta), tau)
    half = merged([tau], theta, WIDEN(calibrated=3.0))
    torch.testing.assert_close(half[:, 0] / tau[:, 0].max(), torch.tensor([2.0, 0.0]))  # (3 + 1) / 2
    torch.testing.assert_close(half[1, 1] / tau[1, 1], torch.tensor(2.0))


def test_without_calibration_equal_tasks_are_averaged():
    theta, tau = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(merged([tau, tau], theta, WIDEN(ratio=10.0)), tau)


def test_a_wrong_base_and_a_wrong_ratio_are_refused():
    with pytest.raises(ValueError, match=r"base model's 'w' of shape \(2, 2\)"):
        WIDEN().update({"w": torch.eye(2)}, statistics={"weights": {"w": torch.eye(3)}})
    with pytest.raises(ValueError, match="ratio"):
        WIDEN(-1.0)
