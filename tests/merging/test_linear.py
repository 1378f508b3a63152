import torch

from clmerge.merging import TaskArithmetic, WeightAverage


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
