import math

import pytest
import torch

from clmerge.merging.required import number_of, positive_number_of
from clmerge.merging.step import Step


def step(value):
    return Step(task=3, position=0, statistics={"loss": value})


@pytest.mark.parametrize("value", [2, 2.0, torch.tensor(2.0)])
def test_numbers_are_read_as_floats(value):
    for read in (number_of, positive_number_of):
        found = read(step(value), "loss")
        assert found == 2.0
        assert type(found) is float


def test_a_number_may_be_negative_unless_it_counts_something():
    assert number_of(step(-1.5), "loss") == -1.5
    for value in (-1.5, 0):
        with pytest.raises(ValueError, match="positive number as 'loss' of task 3"):
            positive_number_of(step(value), "loss")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_nan_and_infinity_are_no_numbers(value):
    with pytest.raises(ValueError, match="finite number as 'loss' of task 3"):
        number_of(step(value), "loss")


def test_tensors_by_name_are_no_number():
    with pytest.raises(TypeError, match="one number as 'loss' of task 3"):
        number_of(step({"w": torch.ones(2)}), "loss")
