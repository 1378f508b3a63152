import pytest
import torch

from clmerge.merging import MagMax, TunableMagMax
from clmerge.merging.sign.tunable_magmax import entry_quotas, quota_winners

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
