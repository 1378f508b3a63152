import math

import pytest
import torch

from clmerge.merging import WeightedAverage


def stream(*pairs, first=0):
    """Merge values with weights e^-loss."""
    merger = WeightedAverage("loss")
    for task, (value, loss) in enumerate(pairs, first):
        merger.update({"w": torch.tensor([value])}, task=task, statistics={"loss": loss})
    return merger


def held(merger):
    """What the accumulator holds, before the division."""
    return merger.state_dict()["slots"]["w"]["sum"].item()


def test_weights_of_ordinary_size_are_summed_as_they_are():
    assert held(stream((4.0, 0.0), (8.0, 0.0))) == 12.0
    assert held(stream((4.0, -math.log(16)), (8.0, math.log(2)))) == pytest.approx(68.0)


def test_sums_are_kept_relative_to_the_largest_weight():
    assert held(stream((4.0, 0.0), (8.0, -400.0))) == 8.0
    assert held(stream((8.0, -400.0), (4.0, 0.0))) == 8.0
    assert held(stream((8.0, -400.0), (4.0, -400.0 + math.log(2)))) == pytest.approx(10.0)


@pytest.mark.parametrize("swap", [False, True])
def test_joining_gives_both_sides_the_larger_offset(swap):
    parts = [stream((1.0, 0.0), (2.0, -30.0)), stream((5.0, -60.0), (9.0, -30.0 + math.log(3)), first=2)]
    left, right = reversed(parts) if swap else parts
    before = right.state_dict()
    left.merge_state(right)
    together = stream((1.0, 0.0), (2.0, -30.0), (5.0, -60.0), (9.0, -30.0 + math.log(3)))
    assert left.compute()["w"].item() == pytest.approx(together.compute()["w"].item())
    assert right.state_dict() == before


def test_after_all_weight_is_taken_out_the_sum_begins_anew():
    merger = stream((0.1, 0.3), (0.7, 0.1))
    merger.downdate({"w": torch.tensor([0.1])}, statistics={"loss": 0.3})
    merger.downdate({"w": torch.tensor([0.7])}, statistics={"loss": 0.1})
    assert merger.num_tasks == 0
    merger.update({"w": torch.tensor([1e-12])}, statistics={"loss": 50.0})
    assert merger.compute()["w"].item() == pytest.approx(1e-12)
