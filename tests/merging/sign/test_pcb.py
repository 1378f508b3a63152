import numpy as np
import pytest
import torch
from support.references import Batch, Case

from clmerge.merging import PCB


def pcb(density: float, clip: float, scale: float) -> Batch:
    def batch(vectors, tasks):
        flat = np.stack([np.concatenate([entries.ravel() for entries in vector.values()]) for vector in vectors])
        count, size = flat.shape
        signs, magnitudes = np.sign(flat), np.abs(flat)
        ranked = np.sort(magnitudes, axis=1)
        low, high = ranked[:, [int(size * clip)]], ranked[:, [max(int(size * (1 - clip) - 1), 0)]]
        magnitudes = np.clip(magnitudes, low, high)
        span = np.where(high > low, high - low, 1)
        norms = signs * np.where(high > low, (magnitudes - low) / span, 1)
        scores = np.exp(count * norms**2) * np.stack([np.tanh(own * norms).sum(axis=0) for own in norms])
        weights = []
        for score in scores:
            threshold = np.sort(score)[min(int(size * (1 - density)), size - 1)]
            top, rounding = score.max(), 1e-9 * np.abs(score).max()
            if top - threshold <= rounding:
                weights.append((score >= threshold - rounding) * float(top > 0))
            else:
                weight = np.clip(score - threshold, 0, None) / (top - threshold)
                weights.append(np.where(weight > 1e-9, weight, 0))
        weights = np.stack(weights)
        merged = scale * (weights * signs * magnitudes).sum(axis=0) / np.maximum(weights.sum(axis=0), 1e-12)
        ends = np.cumsum([entries.size for entries in vectors[0].values()])[:-1]
        pieces = np.split(merged, ends)
        return {name: piece.reshape(vectors[0][name].shape) for name, piece in zip(vectors[0], pieces, strict=True)}

    return batch


CASES = {
    "PCB": Case(PCB, pcb(0.05, 0.01, 1.2)),
    "PCB dense": Case(lambda: PCB(1.0, clip=0.0, scale=0.5), pcb(1.0, 0.0, 0.5)),
    "PCB half": Case(lambda: PCB(0.5, clip=0.1, scale=-1.0), pcb(0.5, 0.1, -1.0)),
}


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
