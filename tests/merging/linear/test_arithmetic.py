import numpy as np
import pytest
import torch
from support.references import Batch, Case, average, stacked, total

from clmerge.merging import TaskArithmetic, WeightAverage

SIGNED_WEIGHTS = [1.0, 1.0, -1.0, 0.5, 0.0, 2.0, -0.25, 1.0, 1.0, -3.0]


def signed_sum(weights: list[float], scale: float) -> Batch:
    def batch(vectors, tasks):
        chosen = [scale * weights[task] for task in tasks]
        return {name: np.tensordot(chosen, stacked(vectors, name), axes=1) for name in vectors[0]}

    return batch


CASES = {
    "WeightAverage": Case(WeightAverage, average(1.0)),
    "WeightAverage scale": Case(lambda: WeightAverage(scale=-2.0), average(-2.0)),
    "TaskArithmetic": Case(TaskArithmetic, total(0.3)),
    "TaskArithmetic negation": Case(lambda: TaskArithmetic(scale=-1.0), total(-1.0)),
    "TaskArithmetic weights": Case(
        lambda: TaskArithmetic(scale=0.5, weights=SIGNED_WEIGHTS), signed_sum(SIGNED_WEIGHTS, 0.5)
    ),
}


def merged(merger, *values):
    for value in values:
        merger.update({"w": torch.tensor([value])})
    return merger.compute()["w"].item()


def test_average_of_one_task_is_the_task():
    assert merged(WeightAverage(), 3.0) == 3.0


def test_average_stays_exact_over_many_tasks():
    assert merged(WeightAverage(), *[1.0] * 1000) == 1.0


def test_negation_subtracts():
    assert merged(TaskArithmetic(scale=-0.5), 4.0) == -2.0


def test_scale_is_applied_when_read_so_it_can_be_changed_afterwards():
    merger = TaskArithmetic(scale=1.0)
    assert merged(merger, 1.0, 2.0) == 3.0
    merger.scale = 2.0
    assert merger.compute()["w"].item() == 6.0


def test_analogy_is_c_plus_b_minus_a():
    assert merged(TaskArithmetic(scale=1.0, weights=[1, 1, -1]), 5.0, 4.0, 3.0) == 6.0


def test_extrapolation_goes_beyond_the_model():
    assert merged(TaskArithmetic(scale=1.5), 4.0) == 6.0


def test_weights_belong_to_task_indices():
    merger = TaskArithmetic(scale=1.0, weights=[1.0, 10.0])
    merger.update({"w": torch.tensor([3.0])}, task=1)
    merger.update({"w": torch.tensor([2.0])}, task=0)
    assert merger.compute()["w"].item() == 32.0


def test_a_task_without_a_weight_is_refused():
    merger = TaskArithmetic(scale=1.0, weights=[1.0, -1.0])
    merged(merger, 3.0, 2.0)
    with pytest.raises(ValueError, match="weights for task 2, got 2 entries"):
        merger.update({"w": torch.tensor([4.0])})
    assert merger.compute()["w"].item() == 1.0
