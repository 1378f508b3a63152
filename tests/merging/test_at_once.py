"""Many parameters at once, as on a GPU: the bits of one parameter at a time, by calls that do not grow in number."""

import copy

import pytest
import torch
from support.merger_cases import CASES
from support.references import gradients, score, statistics_of
from torch.utils._python_dispatch import TorchDispatchMode

from clmerge.merging import (
    EMR,
    TIES,
    Breadcrumbs,
    Fisher,
    GreedySoup,
    MagMax,
    TaskArithmetic,
    TrimTensor,
    WeightAverage,
)
from clmerge.merging.accumulators import allocate
from clmerge.merging.at_once import Joined, largest_magnitudes, packed_slots
from clmerge.merging.merger import Merger
from clmerge.merging.threshold import kth_largest_magnitude, kth_largest_of_each

SHAPES = {"matrix": (4, 5), "bias": (5,), "scalar": (), "one": (1,), "empty": (0, 3), "long": (3, 40)}


@pytest.fixture
def at_once(monkeypatch):
    """Treat the CPU as a device that takes up to so many entries at once."""

    def begin(entries):
        monkeypatch.setattr("clmerge.merging.blocks.ONE_BY_ONE", frozenset())
        monkeypatch.setattr("clmerge.merging.blocks.DEVICE_BLOCK", entries)

    return begin


def vectors(count=3, shapes=SHAPES, step=0.0):
    generator = torch.Generator().manual_seed(0)
    drawn = [{n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(count)]
    return [{n: (t / step).round() * step for n, t in v.items()} for v in drawn] if step else drawn


def folded(merger, taus):
    for tau in taus:
        task = merger.num_tasks
        given = statistics_of(task, {name: tuple(tensor.shape) for name, tensor in tau.items()})
        merger.update(tau, task=task, score=score, gradients=gradients, statistics=given)
    return merger


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape for name in ours)


ENTRYWISE = [label for label, case in CASES.items() if type(case.build())._fold is Merger._fold]


def test_the_entrywise_rules_are_among_the_cases():
    found = {type(CASES[label].build()) for label in ENTRYWISE}
    assert {TaskArithmetic, WeightAverage, MagMax, TIES, GreedySoup} <= found


@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize("entries", [80, 1000])
def test_every_rule_gives_the_bits_of_one_parameter_at_a_time(label, entries, at_once):
    taus = vectors(step=0.0 if CASES[label].generic else 0.25)
    alone = folded(CASES[label].build(), taus).compute()
    at_once(entries)
    assert_same(folded(CASES[label].build(), taus).compute(), alone)


@pytest.mark.parametrize("label", ENTRYWISE)
def test_what_is_saved_copied_joined_and_removed_stays_the_same(label, at_once):
    taus = vectors(4)

    def through():
        build = CASES[label].build
        merger = folded(build(), taus[:2])
        again = build()
        again.load_state_dict(merger.state_dict())
        found = [folded(copy.deepcopy(again), taus[2:]).compute(), merger.compute()]
        if merger.order_free:
            other = build()
            for task in (2, 3):
                given = statistics_of(task, {name: tuple(tensor.shape) for name, tensor in taus[task].items()})
                other.update(taus[task], task=task, score=score, gradients=gradients, statistics=given)
            again.merge_state(other)
            found.append(again.compute())
        return found

    alone = through()
    at_once(1000)
    for ours, theirs in zip(through(), alone, strict=True):
        assert_same(ours, theirs)


def test_a_task_is_taken_out_of_accumulators_that_lie_together(at_once):
    at_once(1000)
    taus = vectors(3)
    merger = folded(TaskArithmetic(scale=1.0), taus)
    merger.downdate(taus[1])
    expected = folded(TaskArithmetic(scale=1.0), [taus[0], taus[2]]).compute()
    for name, tensor in merger.compute().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_counts_that_outgrow_a_byte_are_laid_out_anew(at_once):
    tau = {"w": torch.tensor([1.0, -1.0]), "b": torch.tensor([2.0])}

    def through():
        merger = TIES(density=1.0)
        for _ in range(130):
            merger.update(tau)
        return merger.compute()

    alone = through()
    at_once(1000)
    assert_same(through(), alone)


def test_half_precision_and_double_are_not_mixed(at_once):
    taus = [
        {"a": tau["matrix"].bfloat16(), "b": tau["bias"].double(), "c": tau["one"].half(), "d": tau["long"]}
        for tau in vectors()
    ]
    alone = folded(TIES(), taus).compute()
    at_once(1000)
    assert_same(folded(TIES(), taus).compute(), alone)


def test_accumulators_that_lie_together_are_found_as_they_are(at_once):
    at_once(1000)
    slots = allocate(vectors(1)[0], {"sum": None, "count": torch.int8}, None)
    first = packed_slots(slots)
    places = {name: one["sum"].data_ptr() for name, one in slots.items()}
    ((pack, flat),) = packed_slots(slots)
    assert pack == first[0][0]
    assert {name: one["sum"].data_ptr() for name, one in slots.items()} == places
    flat["count"].fill_(3)
    assert all(one["count"].eq(3).all() for one in slots.values())
    assert [tuple(one["sum"].shape) for one in slots.values()] == [*SHAPES.values()]


class Counted(TorchDispatchMode):
    """Count operations that do work, and questions to the device."""

    def __init__(self):
        super().__init__()
        self.operations, self.questions = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += not function.is_view
        self.questions += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_records_of_tasks_are_those_of_one_at_a_time(at_once):
    taus = [{**tau, "half": tau["long"].bfloat16(), "last": tau["bias"].clone()} for tau in vectors(3)]
    for rescale in ("l1", "tensor_mean"):
        alone = folded(EMR(rescale=rescale), taus)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("clmerge.merging.blocks.ONE_BY_ONE", frozenset())
            patch.setattr("clmerge.merging.blocks.DEVICE_BLOCK", 100)  # the largest is alone, and out of order
            together = folded(EMR(rescale=rescale), taus)
        for task in range(3):
            assert_same(together.task_view(task), alone.task_view(task))
        assert torch.equal(together._records["1"]["positive"], alone._records["1"]["positive"])


@pytest.mark.parametrize("build", [TaskArithmetic, WeightAverage, MagMax, TIES, lambda: TIES(trim="tensor"), Fisher])
def test_operations_of_an_update_do_not_grow_with_the_number_of_parameters(build, at_once):
    at_once(1 << 20)

    def count(parameters):
        shapes = {f"{name}{index}": shape for index in range(parameters) for name, shape in SHAPES.items()}
        first, second = vectors(2, shapes)
        merger = build()
        fisher = {name: tensor.square() for name, tensor in first.items()}
        merger.update(first, statistics={"fisher": fisher})
        with Counted() as counted:
            merger.update(second, statistics={"fisher": fisher})
        return counted.operations, counted.questions

    assert count(30) == count(10)


@pytest.mark.parametrize("build", [EMR, Breadcrumbs])
def test_a_device_is_not_asked_about_every_parameter(build, at_once):
    at_once(1 << 20)

    def count(parameters):
        first, second = vectors(2, {f"w{index}": (4, 5) for index in range(parameters)})
        merger = build()
        merger.update(first)
        with Counted() as counted:
            merger.update(second)
        return counted.questions

    assert count(30) == count(10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_thresholds_of_each_are_those_of_one_at_a_time(dtype, step, at_once):
    tau = {name: tensor.to(dtype) for name, tensor in vectors(1, step=step)[0].items()}
    tau["zeros"], tau["tiny"] = torch.zeros(9, dtype=dtype), torch.full((6,), 1e-30, dtype=dtype)
    for share in (0.2, 0.5, 0.99):
        ranks = {name: max(1, int(share * tensor.numel())) for name, tensor in tau.items()}
        expected = {n: kth_largest_magnitude([t], ranks[n]) for n, t in tau.items() if ranks[n] < t.numel()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("clmerge.merging.blocks.ONE_BY_ONE", frozenset())
            found = kth_largest_of_each(tau, lambda numel, share=share: max(1, int(share * numel)))
        assert list(found) == list(tau)
        assert {name: found[name] for name in expected} == expected
        assert all(found[name] == (0.0, 0) for name in tau.keys() - expected.keys())


@pytest.mark.parametrize("step", [0.0, 0.5])
def test_a_trim_by_tensor_keeps_the_same_entries(step, at_once):
    tau = vectors(1, step=step)[0]
    alone = TrimTensor(0.3)(tau)
    at_once(1000)
    assert_same(TrimTensor(0.3)(tau), alone)


def test_the_threshold_of_many_tensors_together_is_exact(at_once):
    flat = [torch.randn(3000, generator=torch.Generator().manual_seed(seed)) for seed in range(30)]
    expected = torch.cat(flat).abs().sort(descending=True).values[20_000 - 1]
    at_once(1 << 15)
    assert [len(piece) for piece in Joined(flat)] == [30_000, 30_000, 30_000]
    assert kth_largest_magnitude(flat, 20_000) == (float(expected), 0)


def test_what_is_not_finite_shows_wherever_it_is(at_once):
    tensors = [torch.tensor([1.0, -3.0]), torch.tensor([0.0, float("nan"), 9.0]), torch.empty(0)]
    tensors += [torch.tensor([-float("inf")]), torch.tensor([[2.0]], dtype=torch.float64), torch.tensor(-7.0)]
    expected = [3.0, float("inf"), 0.0, float("inf"), 2.0, 7.0]
    assert largest_magnitudes(tensors) == expected
    at_once(1000)
    assert largest_magnitudes(tensors) == expected
    with pytest.raises(ValueError, match="got 1 NaN or Inf among the 2 entries of 'w'"):
        MagMax().update({"b": torch.ones(1), "w": torch.tensor([1.0, float("nan")])})
