import math

import numpy as np
import pytest
import torch
from support.references import PREFERENCES, Case, norm, statistic, weighted

from clmerge.merging import WeightedAverage


def by_inverse_norm(vectors, tasks):
    return [1 / norm(vector) if norm(vector) else 0 for vector in vectors]


def by_loss(temperature: float):
    return lambda vectors, tasks: np.exp([-statistic("loss", task) / temperature for task in tasks])


CASES = {
    "WeightedAverage": Case(
        WeightedAverage,
        weighted(lambda vectors, tasks: [statistic("samples", task) for task in tasks]),
    ),
    "WeightedAverage loss": Case(lambda: WeightedAverage("loss"), weighted(by_loss(1.0))),
    "WeightedAverage loss, cold": Case(
        lambda: WeightedAverage("loss", temperature=0.5, scale=0.5), weighted(by_loss(0.5), 0.5)
    ),
    "WeightedAverage inverse norm": Case(lambda: WeightedAverage("inverse_norm"), weighted(by_inverse_norm)),
    "WeightedAverage given": Case(
        lambda: WeightedAverage("given", weights=PREFERENCES),
        weighted(lambda vectors, tasks: [PREFERENCES[task] for task in tasks]),
    ),
}


def merged(merger, values, statistics=None, first=0):
    for index, value in enumerate(values):
        given = statistics[index] if statistics else None
        merger.update({"w": torch.tensor(value)}, task=first + index, statistics=given)
    return merger.compute()["w"].tolist()


def losses(*values):
    return [{"loss": value} for value in values]


def test_a_task_with_three_times_the_samples_counts_three_times():
    assert merged(WeightedAverage(), [[1.0], [5.0]], [{"samples": 30}, {"samples": 10}]) == [2.0]


def test_softmax_of_the_negative_losses():
    # exp(-log 3) : exp(-0) = 1 : 3
    assert merged(WeightedAverage("loss"), [[4.0], [8.0]], losses(math.log(3), 0.0)) == pytest.approx([7.0])
    # A temperature of 1/2 squares the ratio: 1 : 9
    assert merged(WeightedAverage("loss", temperature=0.5), [[0.0], [10.0]], losses(math.log(3), 0.0)) == pytest.approx(
        [9.0]
    )


@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_losses_of_any_size_neither_overflow_nor_vanish(shift):
    values = [[4.0], [8.0], [100.0]]
    statistics = losses(shift + math.log(3), shift, shift + 1e4)
    assert merged(WeightedAverage("loss"), values, statistics) == pytest.approx([7.0])
    assert merged(WeightedAverage("loss"), values[::-1], statistics[::-1]) == pytest.approx([7.0])


def test_joining_streams_whose_losses_are_far_apart():
    left, right = WeightedAverage("loss"), WeightedAverage("loss")
    merged(left, [[4.0]], losses(1000.0 + math.log(3)))
    merged(right, [[50.0], [8.0]], losses(3000.0, 1000.0), first=1)
    before = right.compute()["w"].item()
    left.merge_state(right)
    assert left.compute()["w"].item() == pytest.approx(7.0)
    assert right.compute()["w"].item() == before


def test_inverse_norm_sums_unit_vectors_and_skips_zeros():
    # Norms 5 and 10: (u1 + u2) / (1/5 + 1/10)
    values = [[3.0, 4.0], [0.0, 0.0], [10.0, 0.0]]
    assert merged(WeightedAverage("inverse_norm"), values) == pytest.approx([1.6 / 0.3, 0.8 / 0.3])


def test_preferences_are_those_of_the_task_index():
    merger = WeightedAverage("given", weights=[0.25, 0.0, 0.75])
    merger.update({"w": torch.tensor([8.0])}, task=2)
    assert merger.compute()["w"].tolist() == [8.0]  # the only one so far
    merger.update({"w": torch.tensor([4.0])}, task=0)
    assert merger.compute()["w"].tolist() == [7.0]
    with pytest.raises(ValueError, match="weights for task 3, got 3 entries"):
        merger.update({"w": torch.tensor([4.0])}, task=3)
    assert merger.num_tasks == 2


def test_nothing_but_weights_of_zero_is_zero_also_after_removal():
    merger = WeightedAverage("given", weights=[0.1, 0.2, 0.7, 0.0])
    vectors = [{"w": torch.tensor([value])} for value in (0.3, 0.7, 1.1, 5.0)]
    for vector in vectors:
        merger.update(vector)
    for task in range(3):
        merger.downdate(vectors[task], task=task)
    assert merger.compute()["w"].tolist() == [0.0]
    merger.update(vectors[0], task=0)
    assert merger.compute()["w"].tolist() == pytest.approx([0.3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "size"}, "got 'size'"),
        ({"by": "given"}, "together with"),
        ({"by": "loss", "weights": [1.0]}, "together with"),
        ({"by": "given", "weights": [0.5, 0.6]}, "sum 1"),
        ({"by": "given", "weights": [1.5, -0.5]}, "0 or more"),
        ({"by": "given", "weights": []}, "sum 1"),
        ({"by": "loss", "temperature": 0.0}, "positive temperature"),
    ],
)
def test_settings_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightedAverage(**arguments)


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        (0, ValueError, "positive"),
        (-3.0, ValueError, "positive"),
        (math.nan, ValueError, "finite"),
        ({"w": torch.ones(1)}, TypeError, "one number"),
    ],
)
def test_samples_that_are_no_number_of_samples_are_refused(samples, error, message):
    merger = WeightedAverage()
    with pytest.raises(error, match=message):
        merger.update({"w": torch.ones(1)}, statistics={"samples": samples})
    assert merger.num_tasks == 0


def test_requirements_are_those_of_the_weights():
    assert WeightedAverage().requires == {"samples"}
    assert WeightedAverage("loss").requires == {"loss"}
    assert WeightedAverage("inverse_norm").requires == frozenset()


def test_a_task_with_nearly_all_of_the_weight_stays():
    merger = WeightedAverage("loss")
    merged(merger, [[4.0], [8.0]], losses(20.0, 0.0))
    with pytest.raises(ValueError, match="merge the other tasks anew"):
        merger.downdate({"w": torch.tensor([8.0])}, statistics={"loss": 0.0})
    assert merger.num_tasks == 2
    merger.downdate({"w": torch.tensor([4.0])}, statistics={"loss": 20.0})
    assert merger.compute()["w"].tolist() == pytest.approx([8.0])


def test_only_inverse_norms_need_the_whole_model():
    assert WeightedAverage().scope == "parameter"
    assert WeightedAverage("inverse_norm").scope == "model"
