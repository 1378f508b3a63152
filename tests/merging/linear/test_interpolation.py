from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.references import Batch, Case, Vector, score

from clmerge.merging import PAINT, WiSEFT

TENTHS = tuple(index / 10 for index in range(11))


def interpolated(shares: Callable[[list[Vector]], list[float]]) -> Batch:
    def batch(vectors, tasks):
        alphas = shares(vectors)
        merged = {name: np.zeros(entries.shape) for name, entries in vectors[0].items()}
        for index, vector in enumerate(vectors):
            weight = alphas[index] * np.prod([1 - alpha for alpha in alphas[index + 1 :]])
            merged = {name: merged[name] + weight * vector[name] for name in merged}
        return merged

    return batch


def best_shares(candidates: tuple[float, ...]) -> Callable[[list[Vector]], list[float]]:
    def shares(vectors):
        chosen = []
        for count in range(1, len(vectors) + 1):
            results = [
                score(interpolated(lambda _, alpha=alpha: [*chosen, alpha])(vectors[:count], []))
                for alpha in candidates
            ]
            chosen.append(candidates[int(np.argmax(results))])
        return chosen

    return shares


CASES = {
    "WiSEFT": Case(WiSEFT, interpolated(lambda vectors: [0.5] * len(vectors))),
    "PAINT": Case(PAINT, interpolated(best_shares(TENTHS)), homogeneous=False),
}


def test_wise_ft_of_one_task_is_the_interpolation_with_the_base():
    merger = WiSEFT(alpha=0.25)
    merger.update({"w": torch.tensor([8.0])})
    assert merger.compute()["w"].item() == 2.0


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, 0.0), (1.0, 3.0)])
def test_the_ends_are_exact(alpha, expected):
    merger = WiSEFT(alpha=alpha)
    for value in (0.1, 0.7, 3.0):
        merger.update({"w": torch.tensor([value])})
    assert merger.compute()["w"].item() == expected


def test_paint_takes_the_best_candidate_and_the_first_of_equals():
    merger = PAINT()
    merger.update({"w": torch.tensor([1.0])}, score=lambda vector: -abs(vector["w"].item() - 0.62))
    merger.update({"w": torch.tensor([2.0])}, score=lambda vector: 1.0)
    assert merger.chosen == [0.6, 0.0]
    assert merger.compute()["w"].item() == pytest.approx(0.6)


def test_paint_scores_every_candidate_once():
    seen = []
    merger = PAINT((0.0, 0.5, 1.0))
    merger.update({"w": torch.tensor([4.0])}, score=lambda vector: seen.append(vector["w"].item()) or 0.0)
    assert seen == [0.0, 2.0, 4.0]


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"alpha in \[0, 1\]"):
        WiSEFT(alpha=1.5)
    with pytest.raises(ValueError, match="candidate shares"):
        PAINT((0.5, 2.0))
    with pytest.raises(ValueError, match="candidate shares"):
        PAINT(())
    with pytest.raises(ValueError, match="expected a held-out metric for PAINT"):
        PAINT().update({"w": torch.ones(1)})
