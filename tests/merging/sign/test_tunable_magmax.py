import numpy as np
import pytest
import torch
from support.references import PREFERENCES, Batch, Case, stacked, uniform

from clmerge.merging import MagMax, TunableMagMax
from clmerge.merging.sign.tunable_magmax import entry_quotas, quota_winners


def tunable_max(preference: list[float] | None, scale: float, seed: int) -> Batch:
    def rule(name, taus, tasks):
        shares = np.ones(len(tasks)) if preference is None else np.array([preference[task] for task in tasks])
        quotas = (taus[0].size * (shares / sum(shares.tolist()))).astype(int)
        quotas[: taus[0].size - quotas.sum()] += 1  # fewer than there are tasks
        sizes = np.abs([tau.ravel() for tau in taus]) * (quotas > 0)[:, None]
        owner = sizes.argmax(axis=0)

        def too_many(task):
            won = np.flatnonzero(owner == task)
            drawn = uniform("tunable_magmax", seed, tasks[task], name, (taus[0].size,))[won]
            return won[np.argsort(drawn, kind="stable")][: max(0, len(won) - quotas[task])]

        for task in range(len(tasks) - 1, 0, -1):
            lost = too_many(task)
            owner[lost] = sizes[:task, lost].argmax(axis=0)
        free = too_many(0).tolist()
        counts = np.bincount(owner, minlength=len(tasks))
        for fits in (lambda entry, task: sizes[1:, entry].argmax() + 1 == task, lambda entry, task: True):
            for task in range(len(tasks) - 1, 0, -1):
                for entry in list(free) if counts[task] < quotas[task] else []:
                    if counts[task] < quotas[task] and fits(entry, task):
                        owner[entry] = task
                        counts[task] += 1
                        free.remove(entry)
        return scale * np.stack([tau.ravel() for tau in taus])[owner, np.arange(taus[0].size)].reshape(taus[0].shape)

    return lambda vectors, tasks: {name: rule(name, stacked(vectors, name), tasks) for name in vectors[0]}


CASES = {
    "TunableMagMax": Case(TunableMagMax, tunable_max(None, 0.5, 0)),
    "TunableMagMax preference": Case(
        lambda: TunableMagMax(PREFERENCES[::-1], scale=1.0, seed=4), tunable_max(PREFERENCES[::-1], 1.0, 4)
    ),
    "TunableMagMax first": Case(lambda: TunableMagMax(PREFERENCES, scale=-1.0), tunable_max(PREFERENCES, -1.0, 0)),
}


GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("preference", [[1.0, 1.0, 1.0], [8.0, 1.0, 1.0], [1.0, 1.0, 8.0], [0.01, 5.0, 1.0]])
@pytest.mark.parametrize("sizes", [(1.0, 1.0, 1.0), (9.0, 1.0, 1.0), (1.0, 1.0, 9.0), (5.0, 0.0, 0.0)])
def test_every_task_wins_its_share(preference, sizes):
    magnitudes = torch.rand(3, 1001, generator=GENERATOR) * torch.tensor(sizes)[:, None]
    quotas = entry_quotas(1001, preference)
    assert sum(quotas) == 1001
    winners = quota_winners(magnitudes, quotas, lambda task: torch.rand(1001, generator=GENERATOR))
    assert winners.bincount(minlength=3).tolist() == quotas


def test_shares_that_fit_give_magmax():
    magnitudes = torch.rand(4, 500, generator=GENERATOR)
    largest = magnitudes.argmax(dim=0)
    winners = quota_winners(magnitudes, largest.bincount(minlength=4).tolist(), lambda task: torch.zeros(500))
    assert torch.equal(winners, largest)


def test_one_task_is_magmax():
    vector = {"w": torch.randn(4, 5, generator=GENERATOR), "scalar": torch.tensor(2.0), "empty": torch.zeros(0, 2)}
    mergers = TunableMagMax(), MagMax()
    for merger in mergers:
        merger.update(vector)
    tuned, plain = (merger.compute() for merger in mergers)
    assert all(torch.equal(tuned[name], plain[name]) for name in vector)


def test_a_larger_preference_wins_more_of_every_parameter():
    vectors = [{"a": torch.full((100,), size), "b": torch.full((10, 10), size)} for size in (1.0, 2.0)]
    merger = TunableMagMax([1.0, 4.0], scale=1.0)
    for vector in vectors:
        merger.update(vector)
    assert [int((tensor == 2.0).sum()) for tensor in merger.compute().values()] == [80, 80]


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="positive preferences"):
        TunableMagMax([1.0, 0.0])
    merger = TunableMagMax([1.0])
    with pytest.raises(ValueError, match="preference for task 1"):
        merger.update({"w": torch.ones(2)}, task=1)
    assert merger.num_tasks == 0
