"""A task that is forgotten: the merged models are those of a stream without it, or nothing has changed."""

import pytest
import torch
from lightning.pytorch import Trainer
from support.tiny import ForeignModule, toy_loader

from clmerge.callbacks import MergeCallback
from clmerge.merging import (
    BECAME,
    EMR,
    PCB,
    TIES,
    Ethos,
    Fisher,
    GreedySoup,
    MagMax,
    RandomMix,
    TaskArithmetic,
    WeightAverage,
)
from clmerge.weights import TaskVectorBank

TASKS = 3


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ForeignModule(batch_norm=True)


def vector(model, task):
    generator = torch.Generator().manual_seed(100 + task)
    return {name: 0.1 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def fisher(model, task):
    return {"fisher": {name: tau.square() + 0.01 for name, tau in vector(model, task).items()}}


def merged(model, mergers, bank=None, *, tasks=range(TASKS), score=None, **options):
    """A callback that has merged the vectors of these tasks, as fits do."""
    needs_images = {"statistics": lambda module: {}} if any(merger.requires for merger in mergers) else {}
    merge = MergeCallback(mergers, bank=bank, score=score, **needs_images, **options)
    merge.start(model)
    for task in tasks:

        def store(tau, task=task):
            if merge.bank is not None:
                merge.bank.append(task, tau, base=merge.base_fingerprint)

        given = {"weights": merge.base} | fisher(model, task)
        merge.fold(vector(model, task), model, task=task, given=given, store=store)
    return merge


def same(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


FROM_THE_BANK = [MagMax, TIES, TaskArithmetic, lambda: PCB(0.5), EMR, RandomMix]


@pytest.mark.parametrize("task", range(TASKS))
def test_what_needs_vectors_alone_has_the_bits_of_a_stream_without_the_task(model, tmp_path, task):
    merge = merged(model, [rule() for rule in FROM_THE_BANK], tmp_path)
    mine = merge.mergers["magmax"]
    merge.forget(task)
    never = merged(model, [rule() for rule in FROM_THE_BANK], tasks=[other for other in range(TASKS) if other != task])
    for name in merge.mergers:
        assert same(merge.merged_state(name), never.merged_state(name)), name
        assert merge.mergers[name].tasks == never.mergers[name].tasks
    assert mine is merge.mergers["magmax"]  # whoever holds the merger sees the same
    assert TaskVectorBank(tmp_path).tasks == [0, 1, 2]  # the file stays


def test_what_needs_more_is_subtracted(model, tmp_path):
    merge = merged(model, [Fisher(), Ethos(), WeightAverage()], tmp_path)
    merge.forget(1, statistics=fisher(model, 1))
    never = merged(model, [Fisher(), Ethos(), WeightAverage()], tasks=(0, 2))
    for name in merge.mergers:
        for key, tensor in merge.merged_state(name).items():
            torch.testing.assert_close(tensor, never.merged_state(name)[key], rtol=1e-4, atol=1e-6)


def test_without_a_bank_the_vector_is_given(model):
    merge = merged(model, [TaskArithmetic()])
    with pytest.raises(ValueError, match="'task_arithmetic': expected the vector of task 1, got none; pass vector="):
        merge.forget(1)
    merge.forget(1, vector=vector(model, 1))
    never = merged(model, [TaskArithmetic()], tasks=(0, 2))
    for key, tensor in merge.merged_state().items():
        torch.testing.assert_close(tensor, never.merged_state()[key])


def test_rules_that_cannot_are_named_and_nothing_changes(model, tmp_path):
    rules = [TaskArithmetic(), MagMax(), Fisher(), BECAME(), GreedySoup()]
    merge = merged(model, rules, score=lambda module: 0.5)
    before = merge.accumulators()
    with pytest.raises(ValueError, match="got 4 of 5 that it cannot; none was changed") as refused:
        merge.forget(1, vector=vector(model, 1))
    message = str(refused.value)
    assert all(f"'{name}': " in message for name in ("magmax", "fisher", "became", "greedy_soup"))
    assert "'task_arithmetic'" not in message
    assert "pass statistics={'fisher': ...}" in message
    assert same(merge.accumulators(), before)
    for task in (7, -1):
        with pytest.raises(ValueError, match=rf"expected one of the merged tasks \[0, 1, 2\], got {task}"):
            merge.forget(task, vector=vector(model, 1))


def test_another_vector_in_the_bank_is_noticed(model, tmp_path):
    merge = merged(model, [MagMax()], tmp_path)
    before = merge.accumulators()
    merge.bank.append(2, vector(model, 9), overwrite=True)
    with pytest.raises(ValueError, match="merged as task 2, got another in the bank"):
        merge.forget(1)
    assert same(merge.accumulators(), before)


def test_all_tasks_can_go_and_the_stream_goes_on(model, tmp_path):
    merge = merged(model, [MagMax(), PCB(0.5)], tmp_path)
    for task in range(TASKS):
        merge.forget(task)
    with pytest.raises(RuntimeError, match="at least one update"):
        merge.merged_vector()
    with pytest.raises(ValueError, match=r"expected one of the merged tasks \[\]"):
        merge.forget(1)
    merge.fold(vector(model, 3), model, store=lambda tau: merge.bank.append(3, tau))
    assert merge.mergers["magmax"].tasks == (3,)  # an index is not given twice
    assert same(merge.merged_state(), merged(model, [MagMax()], tasks=(3,)).merged_state())


def test_a_checkpoint_does_not_bring_the_task_back(model, tmp_path):
    merge = merged(model, [MagMax()], tmp_path)
    older = merge.accumulators()
    longer = merged(model, [MagMax()], tasks=range(4)).accumulators()
    merge.forget(1)
    now = merge.accumulators()
    assert not merge.go_on_from(older)
    assert same(merge.accumulators(), now)
    with pytest.raises(RuntimeError, match="without task 1, which this callback has forgotten"):
        merge.go_on_from(longer)
    again = MergeCallback(MagMax(), bank=tmp_path)
    again.load_accumulators(now)
    assert again.forgotten == [1]
    assert again.mergers["magmax"].tasks == (0, 2)
    assert merge.go_on_from(again.accumulators())


def test_running_statistics_over_all_tasks_are_refused(model):
    merge = merged(model, [TaskArithmetic()], buffers="mean")
    with pytest.raises(RuntimeError, match="buffers='mean'"):
        merge.forget(1, vector=vector(model, 1))
    assert merge.mergers["task_arithmetic"].tasks == (0, 1, 2)


def test_not_while_merged_weights_are_in_the_model(model):
    merge = merged(model, [TaskArithmetic()])
    with merge.merged(model), pytest.raises(RuntimeError, match=r"outside of merge\.merged"):
        merge.forget(1, vector=vector(model, 1))


class Callable(ForeignModule):
    def forward(self, x):
        return self.net(x)


def test_running_statistics_are_estimated_again_without_the_task():
    torch.manual_seed(0)
    model = Callable(batch_norm=True)
    images = [torch.randn(8, 4)]
    options = {"buffers": "re-estimated", "images": lambda module: images}
    merge = merged(model, [TaskArithmetic()], **options)
    with pytest.raises(ValueError, match="pass model="):
        merge.forget(1, vector=vector(model, 1))
    merge.forget(1, model, vector=vector(model, 1))
    never = merged(model, [TaskArithmetic()], tasks=(0, 2), **options)
    for key, tensor in merge.merged_state().items():
        torch.testing.assert_close(tensor, never.merged_state()[key])
    for task in (0, 2):
        merge.forget(task, model, vector=vector(model, task))
    assert merge.mergers["task_arithmetic"].tasks == ()


def test_a_trainer_evaluates_the_model_without_the_task(tmp_path):
    torch.manual_seed(0)
    model = ForeignModule()
    merge = MergeCallback(MagMax(), bank=tmp_path)

    def trainer():
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return Trainer(max_epochs=1, accelerator="cpu", callbacks=[merge], enable_checkpointing=False, **quiet)

    for task in range(2):
        trainer().fit(model, toy_loader(task))
    merge.forget(0)
    model.seen.clear()
    trainer().test(model, toy_loader(0), verbose=False)
    assert model.seen[0] == float(merge.merged_state()["net.0.weight"].sum())
    trainer().fit(model, toy_loader(2))
    assert merge.mergers["magmax"].tasks == (1, 2)
    assert merge.bank.tasks == [0, 1, 2]
