"""A fit that starts from a checkpoint of an earlier task, in the same process or in one process per task."""

import argparse

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from support.foreign import BackboneModule, magmax, weights
from support.tiny import toy_loader

from clmerge.callbacks import MergeCallback
from clmerge.merging import TIES, MagMax
from clmerge.weights import TaskVectorBank

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def new_trainer(*callbacks, epochs=2):
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )


def saver(folder, **options):
    return ModelCheckpoint(folder, save_last=True, **options)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BackboneModule()


def check_merged(merge, base, left):
    taus = [{name: theta[name] - base[name] for name in base} for theta in left]
    assert merge.num_tasks == len(left)
    torch.testing.assert_close(merge.merged_state(), magmax(base, taus, scale=0.5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hold_merge", [True, False], ids=["after the merge", "before the merge"])
def test_fits_from_the_checkpoint_of_the_task_before_merge_all_tasks(model, tmp_path, monkeypatch, hold_merge):
    """The checkpoint of an earlier task never takes the merges back, not even one that was written before its merge."""
    if not hold_merge:
        monkeypatch.setattr("clmerge.callbacks.merge.keep_merge", lambda *args, **options: None)
    merge, base, left, last = MergeCallback(MagMax(scale=0.5)), weights(model), [], None
    for task in range(3):
        saving = saver(tmp_path / str(task))
        new_trainer(merge, saving, epochs=2 * (task + 1)).fit(model, toy_loader(task), ckpt_path=last)
        left.append(weights(model))
        last = saving.last_model_path
    check_merged(merge, base, left)


@pytest.mark.parametrize("kind", ["last", "best"])
@pytest.mark.parametrize("start_policy", ["previous", "base"])
def test_one_process_per_task_goes_on_from_the_checkpoint(model, tmp_path, start_policy, kind):
    base, left, starts, path = weights(model), [], [], None

    class Start(ModelCheckpoint):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 6 * len(left):
                starts.append(weights(pl_module))

    for task in range(3):  # nothing but the checkpoint is handed on
        module, merge = BackboneModule(), MergeCallback(MagMax(scale=0.5), start_policy=start_policy)
        saving = saver(tmp_path / str(task))
        module.load_state_dict(base)
        new_trainer(merge, saving, Start(tmp_path, save_top_k=0), epochs=2 * (task + 1)).fit(
            module, toy_loader(task), ckpt_path=path
        )
        left.append(weights(module))
        path = saving.last_model_path if kind == "last" else saving.best_model_path
    check_merged(merge, base, left)
    torch.testing.assert_close(starts, [base] * 3 if start_policy == "base" else [base, *left[:2]], rtol=0, atol=0)


def test_one_process_per_task_with_new_optimizers(model, tmp_path):
    """The usual way: weights and merges of the task before, and nothing else of its fit."""
    base, left, path = weights(model), [], None
    for task in range(3):
        module, merge = BackboneModule(), MergeCallback(MagMax(scale=0.5), bank=tmp_path / "bank")
        module.load_state_dict(base)
        if path:
            merge.load_checkpoint(path)
            module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        saving = saver(tmp_path / str(task))
        new_trainer(merge, saving).fit(module, toy_loader(task))
        left.append(weights(module))
        path = saving.last_model_path
    check_merged(merge, base, left)
    assert TaskVectorBank(tmp_path / "bank").tasks == [0, 1, 2]


def test_a_checkpoint_of_a_done_task_that_trains_nothing_more_is_not_merged_twice(model, tmp_path):
    merge, saving = MergeCallback(MagMax()), saver(tmp_path)
    new_trainer(merge, saving).fit(model, toy_loader(0))
    again = MergeCallback(MagMax())
    with pytest.warns(RuntimeWarning, match="also where ckpt_path is of an earlier task"):
        new_trainer(again).fit(model, toy_loader(1), ckpt_path=saving.last_model_path)
    assert again.num_tasks == 1


def test_a_checkpoint_of_another_stream_is_refused(model, tmp_path):
    base = weights(model)
    other, saving = MergeCallback(MagMax()), saver(tmp_path)
    new_trainer(other, saving).fit(model, toy_loader(5))
    model.load_state_dict(base)
    merge = MergeCallback(MagMax())
    new_trainer(merge).fit(model, toy_loader(0))
    before = merge.merged_state()
    with pytest.raises(RuntimeError, match="of which 1 tasks are merged here, got one with 1 tasks of another"):
        new_trainer(merge, epochs=9).fit(model, toy_loader(1), ckpt_path=saving.last_model_path)
    assert merge.num_tasks == 1
    torch.testing.assert_close(merge.merged_state(), before, rtol=0, atol=0)


def test_a_checkpoint_with_later_merges_of_the_same_stream_is_taken_over(model, tmp_path):
    base = weights(model)
    merge, saving = MergeCallback(MagMax(scale=0.5)), saver(tmp_path)
    new_trainer(merge).fit(model, toy_loader(0))
    first = merge.accumulators()
    left = [weights(model)]
    new_trainer(merge, saving).fit(model, toy_loader(1))
    left.append(weights(model))
    behind = MergeCallback(MagMax(scale=0.5))
    behind.load_accumulators(first)
    new_trainer(behind, epochs=4).fit(model, toy_loader(2), ckpt_path=saving.last_model_path)
    check_merged(behind, base, [*left, weights(model)])


def test_load_checkpoint_says_what_is_missing(model, tmp_path):
    saving = saver(tmp_path / "a", save_weights_only=True)
    merge = MergeCallback(MagMax())
    new_trainer(merge, saving).fit(model, toy_loader(0))
    with pytest.raises(ValueError, match=r"expected the state .*MergeCallback.* got none, as with save_weights_only"):
        merge.load_checkpoint(saving.last_model_path)
    saving = saver(tmp_path / "b")
    new_trainer(merge, saving).fit(model, toy_loader(1))
    with pytest.raises(ValueError, match=r"'ties'.*got \[.*'magmax'.*use the mergers and the start policy"):
        MergeCallback(TIES()).load_checkpoint(saving.last_model_path)
    found = torch.load(saving.last_model_path, weights_only=True)
    found["callbacks"][merge.state_key]["pending"] = True
    torch.save(found, tmp_path / "pending.ckpt")
    with pytest.raises(ValueError, match=r"written during task 2 of a fit that did not end; resume it"):
        merge.load_checkpoint(tmp_path / "pending.ckpt")
    torch.save(found | {"hyper_parameters": argparse.Namespace(lr=1)}, tmp_path / "pickled.ckpt")
    with pytest.raises(ValueError, match="with pickled objects, hyper-parameters perhaps"):
        merge.load_checkpoint(tmp_path / "pickled.ckpt")


class _Counted(BackboneModule):
    steps = 0

    def training_step(self, batch, batch_idx):
        type(self).steps += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("other", ["more tasks", "another task", "another base"])
def test_a_bank_of_another_stream_is_refused_before_training(tmp_path, other):
    torch.manual_seed(0)
    model = _Counted()
    start = weights(model)
    new_trainer(MergeCallback(MagMax(), bank=tmp_path)).fit(model, toy_loader(0))
    model.load_state_dict(start)
    base = {name: tensor + 1 for name, tensor in start.items()} if other == "another base" else None
    merge = MergeCallback(MagMax(), base=base)
    if other != "more tasks":
        new_trainer(merge).fit(model, toy_loader(3))
    merge.bank = TaskVectorBank(tmp_path)
    _Counted.steps = 0
    message = {
        "more tasks": r"got .*task_000\.safetensors after 0 merged tasks; use a new folder, or go on",
        "another task": r"merged as task 0, got another in .*task_000\.safetensors; use a new folder",
        "another base": r"expected task vectors of the base model .* with some of",
    }[other]
    with pytest.raises(RuntimeError, match=message):
        new_trainer(merge).fit(model, toy_loader(1))
    assert _Counted.steps == 0
