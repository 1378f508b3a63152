"""Rules that keep every task vector: in memory, packed, or by reference to a bank."""

import copy
import io

import pytest
import torch

from clmerge.merging import (
    PCB,
    TALL,
    Consensus,
    IsoCTS,
    KnOTS,
    MagMax,
    Pipeline,
    Quantise,
    RandomDrop,
    TrimModel,
    TunableMagMax,
    relocated,
)
from clmerge.weights import BankVector, CheckedVector, TaskVectorBank

SHAPES = {"matrix": (4, 5), "bias": (5,), "scalar": (), "empty": (0, 3)}
GENERATOR = torch.Generator().manual_seed(0)
VECTORS = [{name: torch.randn(shape, generator=GENERATOR) for name, shape in SHAPES.items()} for _ in range(4)]
RULES = {
    "tall": TALL,
    "consensus": Consensus,
    "pcb": lambda: PCB(0.5),
    "iso_cts": IsoCTS,
    "knots": KnOTS,
    "tunable_magmax": TunableMagMax,
    "drop": lambda: Pipeline(TALL(), sparsifier=RandomDrop(0.5)),
    "trim": lambda: Pipeline(PCB(0.5), sparsifier=TrimModel(0.5)),
    "nested": lambda: Pipeline(Pipeline(TALL(), sparsifier=RandomDrop(0.5)), sparsifier=TrimModel(0.5)),
    "packed": lambda: Pipeline(TALL(), sparsifier=Quantise(1)),
    "trimmed and packed": lambda: Pipeline(Pipeline(TALL(), sparsifier=Quantise(8)), sparsifier=TrimModel(0.5)),
}
each_rule = pytest.mark.parametrize("rule", RULES)


def tensors_in(state):
    if isinstance(state, torch.Tensor):
        return [state]
    return [tensor for value in state.values() for tensor in tensors_in(value)] if isinstance(state, dict) else []


def update(merger, bank, task):
    vector = CheckedVector(VECTORS[task])
    vector.stored = BankVector(bank, task, vector.sha256)
    merger.update(vector, task=task)
    bank.append(task, VECTORS[task])


def filled(rule, bank, tasks=range(4)):
    merger = RULES[rule]()
    for task in tasks:
        update(merger, bank, task)
    return merger


def in_memory(rule, tasks=range(4)):
    merger = RULES[rule]()
    for task in tasks:
        merger.update(VECTORS[task], task=task)
    return merger


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@each_rule
def test_reading_from_a_bank_gives_the_same_bits_after_every_task(rule, tmp_path):
    memory, banked, bank = RULES[rule](), RULES[rule](), TaskVectorBank(tmp_path)
    for task in range(4):
        memory.update(VECTORS[task], task=task)
        update(banked, bank, task)
        assert same(banked.compute(), memory.compute())


@each_rule
def test_the_state_does_not_grow_with_the_number_of_tasks(rule, tmp_path):
    merger = filled(rule, TaskVectorBank(tmp_path))
    assert not tensors_in(merger.state_dict())
    assert merger.state_size({"w": (30,)}, 4) == merger.state_size({"w": (30,)}, 400) == 0
    assert in_memory(rule).state_size({"w": (30,)}, 4) > 0


@each_rule
def test_resuming_from_references(rule, tmp_path):
    bank = TaskVectorBank(tmp_path / "bank")
    file = io.BytesIO()
    torch.save(filled(rule, bank, range(2)).state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    beside = relocated(state, bank.folder.resolve(), "")  # as it is saved beside its bank
    with pytest.raises(ValueError, match=r"bank=\.\.\.\), or relocated\(state"):
        RULES[rule]().load_state_dict(beside)
    (tmp_path / "bank").rename(tmp_path / "moved")
    resumed, moved = RULES[rule](), TaskVectorBank(tmp_path / "moved")
    resumed.load_state_dict(relocated(beside, "", moved.folder))
    for task in (2, 3):
        update(resumed, moved, task)
    assert same(resumed.compute(), in_memory(rule).compute())
    assert same(copy.deepcopy(resumed).compute(), in_memory(rule).compute())


@pytest.mark.parametrize("rule", [rule for rule in RULES if RULES[rule]().order_free])
def test_joining_references_and_copies(rule, tmp_path):
    left = filled(rule, TaskVectorBank(tmp_path / "left"), (0, 1))
    left.merge_state(filled(rule, TaskVectorBank(tmp_path / "right"), (2,)))
    left.merge_state(in_memory(rule, (3,)))
    assert same(left.compute(), in_memory(rule).compute())
    resumed = RULES[rule]()
    resumed.load_state_dict(left.state_dict())
    assert same(resumed.compute(), in_memory(rule).compute())


def test_a_stored_vector_may_be_given_in_place_of_a_copy(tmp_path):
    bank, merger = TaskVectorBank(tmp_path), PCB(0.5)
    for task, vector in enumerate(VECTORS):
        bank.append(task, vector)
        merger.update(BankVector(bank, task))
    assert not tensors_in(merger.state_dict())
    assert same(merger.compute(), in_memory("pcb").compute())
    streaming = MagMax()
    streaming.update(BankVector(bank, 0))
    assert torch.equal(streaming.compute()["bias"], VECTORS[0]["bias"] / 2)


def test_another_vector_in_the_bank_is_noticed(tmp_path):
    bank = TaskVectorBank(tmp_path)
    merger = filled("pcb", bank)
    bank.append(1, VECTORS[0], overwrite=True)
    with pytest.raises(ValueError, match="as it was merged"):
        merger.compute()
    bank.path(1).unlink()
    with pytest.raises(FileNotFoundError, match="task vector of task 1"):
        merger.compute()


def test_task_views_are_read_from_the_bank(tmp_path):
    assert same(filled("tall", TaskVectorBank(tmp_path)).task_view(2), in_memory("tall").task_view(2))


@pytest.mark.parametrize(("bits", "taken"), [(1, 3 + 4 + 1 + 4 + 1 + 4 + 0 + 4), (8, 20 + 4 + 5 + 4 + 1 + 4 + 0 + 4)])
def test_packed_vectors_take_the_bytes_that_are_said(bits, taken):
    merger = Pipeline(TALL(), sparsifier=Quantise(bits))
    for vector in VECTORS:
        merger.update(vector)
    assert (
        merger.state_size({name: tuple(tau.shape) for name, tau in VECTORS[0].items()}, 4)
        == 4 * taken
        == sum(tensor.nbytes for tensor in tensors_in(merger.state_dict()))
    )
    twin = Pipeline(TALL(), sparsifier=Quantise(bits))
    twin.load_state_dict(merger.state_dict())
    assert same(twin.compute(), merger.compute())


@pytest.mark.parametrize("rule", ["tall", "packed"])
def test_a_damaged_state_is_refused(rule):
    merger, state = in_memory(rule, (0,)), in_memory(rule).state_dict()
    before = merger.compute()
    kept = (state if rule == "tall" else state["extras"]["parts"]["0"])["extras"]["kept"]
    del kept["2"]["parts"]["bias"]
    with pytest.raises(ValueError, match="damaged"):
        merger.load_state_dict(state)
    assert same(merger.compute(), before)


def test_moving_kept_vectors_keeps_them_there():
    merger = in_memory("tall").to("meta")
    assert {tensor.device.type for tensor in tensors_in(merger.state_dict())} == {"meta"}
