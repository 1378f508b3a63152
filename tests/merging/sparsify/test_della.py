import numpy as np
import pytest
import torch
from support.references import Batch, Case, max_magnitude, ties, total, uniform

from clmerge.merging import DARE, DELLA, MagMax, MagnitudeDrop, TaskArithmetic
from clmerge.merging.sparsify.della import keep_probabilities


def dropped_by_rank(drop_rate: float, window: float, rescale: str, seed: int, reduce: Batch) -> Batch:
    def sparse(name, entries, task):
        rows = entries.reshape(len(entries), -1) if entries.ndim > 1 and entries.size else entries.reshape(1, -1)
        ranks = np.abs(rows).argsort(axis=1, kind="stable").argsort(axis=1)
        columns = rows.shape[1]
        position = ranks / (columns - 1) - 0.5 if columns > 1 else np.zeros(rows.shape)
        share = (1 - drop_rate + window * position).reshape(entries.shape)
        kept = np.where(uniform("della", seed, task, name, entries.shape) < share, entries, 0)
        if rescale == "probability":
            return kept / share
        rest = np.abs(kept).sum()
        return kept * (np.abs(entries).sum() / rest if rescale == "l1" and rest else 1)

    return lambda vectors, tasks: reduce(
        [{name: sparse(name, v[name], task) for name in v} for v, task in zip(vectors, tasks, strict=True)], tasks
    )


CASES = {
    "DELLA": Case(DELLA, dropped_by_rank(0.3, 0.14, "probability", 0, ties(1.0, "tensor", "mean", 1.1))),
    "DELLA l1, task arithmetic": Case(
        lambda: DELLA(0.6, window=0.5, rescale="l1", seed=5, reducer=TaskArithmetic(0.5)),
        dropped_by_rank(0.6, 0.5, "l1", 5, total(0.5)),
    ),
    "DELLA none, max": Case(
        lambda: DELLA(0.5, rescale="none", reducer=MagMax()),
        dropped_by_rank(0.5, 0.14, "none", 0, max_magnitude(0.5)),
    ),
}


NORMAL = torch.randn(600, 500, generator=torch.Generator().manual_seed(0))


def test_probabilities_follow_the_ranks_of_each_row():
    probabilities = keep_probabilities(torch.tensor([[1.0, -2.0, 3.0], [0.3, 0.2, -0.1]]), 0.7, 0.2)
    torch.testing.assert_close(probabilities, torch.tensor([[0.6, 0.7, 0.8], [0.8, 0.7, 0.6]]).double())
    assert keep_probabilities(torch.ones(2, 1), 0.7, 0.2).tolist() == [[0.7], [0.7]]


def test_large_entries_are_kept_more_often_and_the_expectation_stays():
    drop = MagnitudeDrop(0.5, window=0.6)
    kept = drop({"w": NORMAL})["w"]
    order = NORMAL.abs().argsort(dim=1)
    share = (kept != 0).float().gather(1, order).mean(dim=0)
    torch.testing.assert_close(share.view(10, 50).mean(dim=1), torch.linspace(0.23, 0.77, 10), atol=0.01, rtol=0)
    assert kept.abs().mean().item() == pytest.approx(NORMAL.abs().mean().item(), rel=0.01)


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (2, 3, 4), (0, 3), (3, 0)])
def test_odd_shapes(shape):
    tau = torch.full(shape, 2.0)
    kept = MagnitudeDrop(0.5, window=0.0)({"w": tau})["w"]
    assert kept.shape == tau.shape
    assert {*kept.reshape(-1).tolist()} <= {0.0, 4.0}


def test_rescaling_to_the_l1_norm_and_not_at_all():
    restored = MagnitudeDrop(0.5, rescale="l1")({"w": NORMAL})["w"]
    assert restored.abs().sum().item() == pytest.approx(NORMAL.abs().sum().item(), rel=1e-5)
    plain = MagnitudeDrop(0.5, rescale="none")({"w": NORMAL})["w"]
    assert torch.equal(plain[plain != 0], NORMAL[plain != 0])
    assert torch.equal(plain != 0, restored != 0)


def test_masks_depend_on_seed_task_and_name():
    def mask(seed=0, task=0, name="w"):
        return MagnitudeDrop(0.5, seed=seed)({name: NORMAL}, task)[name] != 0

    assert torch.equal(mask(), mask())
    assert not any(torch.equal(mask(), other) for other in (mask(seed=1), mask(task=1), mask(name="v")))


def test_no_window_drops_as_often_as_dare():
    merged = []
    for merger in (DELLA(0.5, window=0.0, reducer=TaskArithmetic(1.0)), DARE(0.5, scale=1.0)):
        merger.update({"w": NORMAL})
        merged.append((merger.compute()["w"] != 0).float().mean().item())
    assert merged[0] == pytest.approx(merged[1], abs=0.01)


@pytest.mark.parametrize(("drop_rate", "window"), [(0.05, 0.14), (0.95, 0.14), (0.5, -0.1), (1.0, 0.0)])
def test_probabilities_are_checked(drop_rate, window):
    with pytest.raises(ValueError, match="window"):
        DELLA(drop_rate, window=window)


def test_other_arguments_are_checked():
    with pytest.raises(ValueError, match="scale or reducer"):
        DELLA(scale=1.0, reducer=MagMax())
    with pytest.raises(ValueError, match="rescale"):
        MagnitudeDrop(rescale="l2")
