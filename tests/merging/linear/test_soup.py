import pytest
import torch
from support.references import Batch, Case, score, stacked

from clmerge.merging import GreedySoup, SortedSoup, TrimTensor
from clmerge.merging.pipeline import Pipeline


def greedy_soup(strict: bool) -> Batch:
    def mean(vectors):
        return {name: stacked(vectors, name).mean(axis=0) for name in vectors[0]}

    def batch(vectors, tasks):
        kept = vectors[:1]
        for vector in vectors[1:]:
            gain = score(mean([*kept, vector])) - score(mean(kept))
            if gain > 0 or (gain == 0 and not strict):
                kept = [*kept, vector]
        return mean(kept)

    return batch


def sorted_soup(strict: bool) -> Batch:
    """The published recipe: all models are sorted by their own score first."""

    def batch(vectors, tasks):
        ranked = [vectors[i] for i in sorted(range(len(vectors)), key=lambda i: -score(vectors[i]))]
        kept = ranked[:1]
        for vector in ranked[1:]:
            mean = {name: stacked([*kept, vector], name).mean(axis=0) for name in vector}
            without = {name: stacked(kept, name).mean(axis=0) for name in vector}
            gain = score(mean) - score(without)
            if gain > 0 or (gain == 0 and not strict):
                kept = [*kept, vector]
        return {name: stacked(kept, name).mean(axis=0) for name in vectors[0]}

    return batch


CASES = {
    "GreedySoup": Case(GreedySoup, greedy_soup(strict=False), homogeneous=False),
    "GreedySoup strict": Case(lambda: GreedySoup(strict=True), greedy_soup(strict=True), homogeneous=False),
    "SortedSoup": Case(SortedSoup, sorted_soup(strict=False), homogeneous=False),
    "SortedSoup strict": Case(lambda: SortedSoup(strict=True), sorted_soup(strict=True), homogeneous=False),
}


def near(target):
    return lambda vector: -abs(vector["w"].item() - target)


def soup(*values, target, strict=False):
    merger = GreedySoup(strict=strict)
    for value in values:
        merger.update({"w": torch.tensor([value])}, score=near(target))
    return merger


def test_what_lowers_the_score_is_left_out():
    merger = soup(1.0, 9.0, 2.0, target=1.5)
    assert merger.compute()["w"].item() == 1.5
    assert merger.num_kept == 2
    assert merger.num_tasks == 3


def test_equal_scores_are_decided_by_strict():
    assert soup(1.0, 3.0, target=1.5, strict=False).num_kept == 2
    assert soup(1.0, 3.0, target=1.5, strict=True).num_kept == 1


def test_both_candidates_are_scored_with_the_metric_of_the_update():
    merger = GreedySoup()
    merger.update({"w": torch.tensor([0.0])}, score=near(0.0))
    merger.update({"w": torch.tensor([10.0])}, score=near(10.0))  # the old score was 0, the best there is
    assert merger.num_kept == 2


def test_a_metric_is_required_and_must_be_a_number():
    merger = soup(1.0, target=1.0)
    with pytest.raises(ValueError, match="expected a held-out metric for GreedySoup"):
        merger.update({"w": torch.tensor([1.0])})
    with pytest.raises(ValueError, match="got NaN"):
        merger.update({"w": torch.tensor([1.0])}, score=lambda vector: float("nan"))
    assert merger.num_tasks == 1


def test_a_metric_that_fails_leaves_the_state_as_it_was():
    merger = soup(1.0, target=1.0)

    def broken(vector):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        merger.update({"w": torch.tensor([5.0])}, score=broken)
    assert merger.num_tasks == 1
    assert merger.compute()["w"].item() == 1.0


def sorted_of(values, target, merger=None):
    merger = merger or SortedSoup()
    for value in values:
        merger.update({"w": torch.tensor(value)}, score=lambda vector: -float((vector["w"] - target).abs().sum()))
    return merger.compute()["w"].tolist()


def test_a_sorted_soup_does_not_depend_on_what_came_first():
    assert sorted_of([[9.0], [1.0], [2.0]], 1.5) == sorted_of([[1.0], [2.0], [9.0]], 1.5) == [1.5]


def test_a_sorted_soup_scores_all_models_with_the_latest_metric():
    merger = SortedSoup()
    merger.update({"w": torch.tensor([0.0])}, score=near(0.0))
    merger.update({"w": torch.tensor([4.0])}, score=near(0.0))
    assert merger.compute()["w"].item() == 0.0
    merger.update({"w": torch.tensor([6.0])}, score=near(5.0))  # what was left out comes back
    assert merger.compute()["w"].item() == 5.0


def test_a_sorted_soup_scores_what_it_averages():
    trimmed = Pipeline(SortedSoup(), sparsifier=TrimTensor(density=0.5))
    assert sorted_of([[4.0, 1.0], [1.0, 2.0]], torch.tensor([4.0, 0.0]), trimmed) == [4.0, 0.0]
