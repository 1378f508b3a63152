import itertools

import numpy as np
import pytest
import torch
from support.references import Case, score, stacked

from clmerge.merging import Pipeline, TrimTensor, WeightSearch


def searched(values, l1):
    """All combinations, in order; the first of equals."""

    def batch(vectors, tasks):
        def mixture(weights):
            return {name: np.tensordot(weights, stacked(vectors, name), axes=1) for name in vectors[0]}

        combinations = list(itertools.product(values, repeat=len(vectors)))
        gains = [score(mixture(weights)) - l1 * np.abs(weights).mean() for weights in combinations]
        return mixture(combinations[int(np.argmax(gains))])

    return batch


VALUES = [0.0, 0.4, 1.1]
CASES = {
    "WeightSearch": Case(lambda: WeightSearch(VALUES, method="grid"), searched(VALUES, 0.0), homogeneous=False),
    "WeightSearch l1": Case(
        lambda: WeightSearch([-1, 0.3, 2], method="grid", l1=0.21),
        searched([-1, 0.3, 2], 0.21),
        homogeneous=False,
    ),
}

TARGET = torch.tensor([0.7, 0.2])


def near(vector):
    return 1 - float((vector["w"] - TARGET).abs().mean())


def search(merger, *vectors):
    for vector in vectors:
        merger.update({"w": torch.tensor(vector)}, score=near)
    return merger


@pytest.mark.parametrize("method", ["quadratic", "cma_es", "gaussian"])
def test_weights_between_the_values_are_found(method):
    merger = search(WeightSearch(method=method, budget=40), [1.0, 0.0], [0.0, 1.0])
    assert merger.weights == pytest.approx(TARGET.tolist(), abs=0.12)
    torch.testing.assert_close(merger.compute()["w"], torch.tensor(merger.weights))


def test_every_update_is_within_its_budget_and_repeats_itself():
    seen = []

    def counted(vector):
        seen.append(vector["w"].tolist())
        return near(vector)

    for _ in range(2):
        merger = WeightSearch(method="cma_es", budget=9)
        for vector in ([1.0, 0.0], [0.0, 1.0]):
            merger.update({"w": torch.tensor(vector)}, score=counted)
    assert len(seen) == 4 * 9
    assert seen[:18] == seen[18:]


def test_a_resumed_search_goes_on_from_the_same_weights():
    vectors = ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0])
    whole = search(WeightSearch(method="cma_es", budget=12), *vectors)
    first = search(WeightSearch(method="cma_es", budget=12), *vectors[:2])
    second = WeightSearch(method="cma_es", budget=12)
    second.load_state_dict(first.state_dict())
    assert search(second, vectors[2]).weights == whole.weights


def test_a_penalty_makes_weights_small():
    weights = [search(WeightSearch([0.0, 1.0], l1=l1), [0.7, 0.2]).weights[0] for l1 in (0.0, 10.0)]
    assert weights[0] > 0.8
    assert weights[1] < 0.01


def test_what_is_scored_is_what_is_merged():
    trimmed = search(Pipeline(WeightSearch([0.0, 1.0], method="grid"), sparsifier=TrimTensor(0.5)), [0.7, 0.3])
    assert trimmed.compute()["w"].tolist() == pytest.approx([0.7, 0.0])


@pytest.mark.parametrize("wrong", [{"values": [1.0]}, {"l1": -1.0}, {"method": "guess"}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WeightSearch(**wrong)
