import numpy as np
import torch
from support.references import Case, Vector, fishers

from clmerge.merging import BECAME


def became(vectors: list[Vector], tasks: list[int]) -> Vector:
    flat = [np.concatenate([entries.ravel() for entries in vector.values()]) for vector in vectors]
    weights = [np.concatenate([f.ravel() for f in w.values()]) for w in fishers(vectors, tasks)]
    merged = flat[0]
    for position in range(1, len(flat)):
        squares = (flat[position] - merged) ** 2
        new, old = squares @ weights[position], squares @ np.sum(weights[:position], axis=0)
        share = new / (new + old) if new + old else 0.0
        merged = (1 - share) * merged + share * flat[position]
    ends = np.cumsum([entries.size for entries in vectors[0].values()])[:-1]
    parts = zip(vectors[0].items(), np.split(merged, ends), strict=True)
    return {name: part.reshape(entries.shape) for (name, entries), part in parts}


CASES = {"BECAME": Case(BECAME, became)}


def fold(taus, fishers):
    merger = BECAME()
    for tau, fisher in zip(taus, fishers, strict=True):
        merger.update({"w": tau}, statistics={"fisher": {"w": fisher}})
    return merger.compute()["w"]


def test_is_the_minimum_on_the_line_of_the_quadratic_losses():
    torch.manual_seed(0)
    taus, fishers = torch.randn(3, 9).double(), torch.rand(3, 9).double()
    before, merged = fold(taus[:2], fishers[:2]), fold(taus, fishers)
    share = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    at = merged + share * (taus[2] - before)
    loss = (fishers[:2].sum(0) * (at - before).square() + fishers[2] * (at - taus[2]).square()).sum()
    (slope,) = torch.autograd.grad(loss, share)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)
    direction = taus[2] - before
    moved = (merged - before) / direction
    torch.testing.assert_close(moved, moved[0].expand(9))


def test_one_share_for_all_parameters():
    merger = BECAME()
    for value, fisher in ((0.0, 1.0), (1.0, 3.0)):
        vector = {"a": torch.full((2,), value), "b": torch.full((2,), 2 * value)}
        merger.update(vector, statistics={"fisher": {"a": torch.full((2,), fisher), "b": torch.zeros(2)}})
    merged = merger.compute()
    torch.testing.assert_close([merged["a"], merged["b"]], [torch.full((2,), 0.75), torch.full((2,), 1.5)])


def test_without_information_all_tasks_count_the_same():
    taus = torch.tensor([[1.0], [2.0], [6.0]])
    torch.testing.assert_close(fold(taus, torch.zeros(3, 1)), torch.tensor([3.0]))
