import pytest
import torch

from clmerge.merging import PCB

GENERATOR = torch.Generator().manual_seed(0)
VECTORS = [{"w": torch.randn(40, 50, generator=GENERATOR), "b": torch.randn(50, generator=GENERATOR)} for _ in "abc"]


def merged(merger, vectors):
    for vector in vectors:
        merger.update(vector)
    return merger.compute()


def test_one_task_keeps_its_largest_entries():
    entries = torch.arange(1.0, 101.0) * torch.tensor([1.0, -1.0]).repeat(50)
    kept = merged(PCB(0.1, clip=0.0, scale=1.0), [{"w": entries}])["w"]
    # The entry at the threshold has weight 0.
    assert kept.nonzero().squeeze(1).tolist() == list(range(91, 100))
    assert torch.equal(kept[91:], entries[91:])


def test_entries_that_disagree_lose_against_entries_that_agree():
    agreeing = torch.tensor([3.0, 3.0, 1.0, 2.0])
    opposing = torch.tensor([-3.0, 3.0, 1.0, 2.0])
    result = merged(PCB(0.5, clip=0.0, scale=1.0), [{"w": agreeing}, {"w": opposing}])["w"]
    assert result[0] == 0.0
    assert result[1] > 0.0


def test_what_is_kept_is_within_the_clamped_range():
    result = merged(PCB(0.2, clip=0.1, scale=1.0), VECTORS)
    bounds = [torch.cat([v["w"].reshape(-1), v["b"]]).abs().quantile(0.9) for v in VECTORS]
    share = torch.cat([(tensor != 0).reshape(-1) for tensor in result.values()]).float().mean()
    assert max(tensor.abs().max() for tensor in result.values()) <= max(bounds)
    assert 0.2 < share < 0.6


def test_equal_scores_weigh_the_same():
    vectors = [{"w": torch.tensor([2.0, -2.0, 2.0])}, {"w": torch.tensor([4.0, -4.0, 4.0])}]
    assert merged(PCB(scale=1.0), vectors)["w"].tolist() == [3.0, -3.0, 3.0]


def test_many_equal_scores_and_empty_models():
    mostly_zero = torch.zeros(1000)
    mostly_zero[:100] = 1.0
    assert torch.equal(merged(PCB(scale=1.0), [{"w": mostly_zero}])["w"], mostly_zero)
    assert merged(PCB(), [{"w": torch.zeros(0, 2)}])["w"].shape == (0, 2)


def test_reading_twice_gives_the_same():
    merger = PCB()
    first = merged(merger, VECTORS)
    second = merger.compute()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="density as a share"):
        PCB(0.0)
    with pytest.raises(ValueError, match="clip as a share"):
        PCB(clip=0.5)
