import copy
import subprocess
import sys

import pytest
import torch

from clmerge.merging import TIES, MagMax, Merger, TaskArithmetic, WeightAverage


class _Latest(Merger):
    """The shortest rule there can be: the last task vector."""

    name = "latest"
    order_free = False
    slots = ("latest",)

    def _fold_block(self, slots, tau, step, plan):
        slots["latest"].copy_(tau)

    def _read_block(self, slots, overview):
        return slots["latest"]


def one(merger, value=1.0):
    merger.update({"w": torch.tensor([value, 2.0])})
    return merger


def test_a_rule_is_two_short_functions():
    merger = one(one(_Latest(), 1.0), 5.0)
    assert merger.compute()["w"].tolist() == [5.0, 2.0]
    assert merger.state_size({"w": (5, 2)}, 3) == 40


@pytest.mark.parametrize("vector", [None, [torch.ones(1)], {"w": 1.0}, {0: torch.ones(1)}])
def test_only_task_vectors_are_taken(vector):
    with pytest.raises(TypeError, match="expected a task vector"):
        MagMax().update(vector)


def test_an_empty_task_vector_is_refused():
    with pytest.raises(ValueError, match="at least one parameter"):
        MagMax().update({})


def test_error_of_a_wrong_shape_names_the_task():
    with pytest.raises(ValueError, match="task vector of task 7"):
        one(MagMax()).update({"w": torch.ones(3)}, task=7)


def test_an_overflow_of_the_sums_is_reported():
    merger = TaskArithmetic(scale=1.0)
    for _ in range(2):
        merger.update({"w": torch.full((2,), 3e38)})
    with pytest.raises(RuntimeError, match="overflow in 'w'"):
        merger.compute()


def test_finite_values_whose_sum_overflows_are_taken():
    merger = MagMax(1.0)
    merger.update({"w": torch.full((2,), 3e38)})
    assert merger.compute()["w"].tolist() == torch.full((2,), 3e38).tolist()


def test_base_is_remembered_once_it_is_known():
    merger = one(MagMax())
    merger.update({"w": torch.ones(2)}, base="abc")
    merger.update({"w": torch.ones(2)})
    assert merger.base == "abc"


def test_state_of_another_rule_or_setting_is_refused():
    state = one(MagMax(0.5)).state_dict()
    with pytest.raises(ValueError, match="class 'MagMax'"):
        WeightAverage().load_state_dict(state)
    with pytest.raises(ValueError, match=r"settings \{'scale': 0\.5\}"):
        MagMax(1.0).load_state_dict(state)


@pytest.mark.parametrize("damage", ["slot", "shape", "parameter"])
def test_a_damaged_state_is_refused_and_nothing_is_loaded(damage):
    state = one(TIES(1.0)).state_dict()
    if damage == "slot":
        del state["slots"]["w"]["pos_sum"]
    if damage == "shape":
        state["slots"]["w"]["pos_sum"] = torch.zeros(3)
    if damage == "parameter":
        del state["slots"]["w"]
    merger = one(TIES(1.0), 7.0)
    with pytest.raises(ValueError, match="expected accumulators"):
        merger.load_state_dict(state)
    assert merger.compute()["w"].tolist() == [7.0, 2.0]


def test_joining_needs_the_same_settings():
    with pytest.raises(RuntimeError, match="same settings"):
        one(MagMax(0.5)).merge_state(one(MagMax(1.0)))


def test_joining_nothing_or_into_nothing():
    empty, full = WeightAverage(), one(WeightAverage())
    full.merge_state(empty)
    assert full.num_tasks == 1
    empty.merge_state(full)
    assert empty.compute()["w"].tolist() == [1.0, 2.0]
    one(empty, 3.0)
    assert full.compute()["w"].tolist() == [1.0, 2.0]


def test_joining_tells_the_base():
    left, right = one(MagMax()), MagMax()
    right.update({"w": torch.ones(2)}, task=1, base="abc")
    left.merge_state(right)
    assert left.base == "abc"


def test_a_task_is_merged_once():
    merger = one(WeightAverage())
    with pytest.raises(ValueError, match="both hold task 0"):
        merger.merge_state(merger)
    with pytest.raises(ValueError, match="task 0 again"):
        merger.update({"w": torch.ones(2)}, task=0)
    assert merger.tasks == (0,)
    assert merger.compute()["w"].tolist() == [1.0, 2.0]


def test_only_what_was_merged_is_taken_out():
    merger = one(one(WeightAverage()), 5.0)
    with pytest.raises(ValueError, match="expected those of a merged task"):
        merger.downdate({"w": torch.tensor([7.0, 2.0])})
    with pytest.raises(ValueError, match="vector and statistics of task 1"):
        merger.downdate({"w": torch.tensor([1.0, 2.0])}, task=1)
    assert merger.tasks == (0, 1)
    merger.downdate({"w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)})
    assert merger.tasks == (1,)
    assert merger.compute()["w"].tolist() == [5.0, 2.0]


def test_a_vector_that_two_tasks_share_is_taken_out_by_its_index():
    merger = one(one(WeightAverage()))
    with pytest.raises(ValueError, match="one task with this vector, got tasks 0, 1"):
        merger.downdate({"w": torch.tensor([1.0, 2.0])})
    merger.downdate({"w": torch.tensor([1.0, 2.0])}, task=0)
    assert merger.tasks == (1,)


def test_after_the_last_task_is_taken_out_nothing_is_left():
    merger = one(WeightAverage())
    merger.downdate({"w": torch.tensor([1.0, 2.0])})
    assert (merger.num_tasks, merger.base) == (0, None)
    merger.update({"other": torch.ones(3)})
    assert merger.compute()["other"].tolist() == [1.0, 1.0, 1.0]


def test_the_next_task_has_an_index_of_its_own():
    merger = one(one(one(WeightAverage()), 5.0), 6.0)
    merger.downdate({"w": torch.tensor([5.0, 2.0])}, task=1)
    one(merger, 9.0)
    assert merger.tasks == (0, 2, 3)


def test_moving_accumulators_keeps_them_there():
    merger = one(MagMax(1.0)).to("meta")
    assert merger.state_dict()["slots"]["w"]["winner"].device.type == "meta"
    merger = MagMax(1.0).to("cpu")
    assert one(merger).compute()["w"].device.type == "cpu"


def test_a_merger_that_was_copied_goes_its_own_way():
    merger = one(MagMax(1.0))
    twin = copy.deepcopy(merger)
    one(twin, 9.0)
    assert merger.compute()["w"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("package", ["clmerge.merging", "clmerge.weights"])
def test_importing_needs_torch_and_safetensors_alone(package):
    heavy = "lightning avalanche wandb open_clip timm torchvision torchmetrics jsonargparse matplotlib"
    program = f"import sys, {package}; print(*(set({heavy.split()!r}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_label_and_repr_show_the_settings():
    assert TIES().label == "ties"
    assert TIES(0.1, trim="tensor").label == "ties_density0.1_trimtensor"
    assert repr(MagMax(0.25)) == "MagMax(scale=0.25)"
