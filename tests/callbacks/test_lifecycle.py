"""What is saved, restored, swapped and merged, whatever is called and whichever callbacks are beside: a matrix."""

import copy
import itertools
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from support.foreign import BackboneModule, magmax, weights
from support.tiny import toy_loader
from torch.utils._pytree import tree_flatten

from clmerge.callbacks import MergeCallback
from clmerge.merging import MagMax, WeightAverage

# Lightning's own advice; ours are RuntimeWarnings.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

STAGES = ["test", "validate", "predict"]
PATHS = ["no path", "best", "last", "explicit"]
TRAINERS = ["same Trainer", "new Trainer"]
POSITIONS = ["first", "last", "two"]
COMPANIONS = {
    "EMA": lambda: EMAWeightAveraging(decay=0.5),
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
    "early stopping": lambda: EarlyStopping("val/loss", patience=0),
    "unfreezing": lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=1),
    "weights only": Callback,  # the ModelCheckpoint of every case saves the weights alone then
}
MATRIX = list(itertools.product(STAGES, PATHS, TRAINERS, POSITIONS, COMPANIONS))
QUICK = MATRIX[::23]  # coprime to the lengths: every value occurs, and most pairs of them


def arranged(merges, companion, saving):
    position = [*merges[:1], companion, *merges[1:]] if len(merges) > 1 else [*merges, companion]
    return [*position, saving]


def new_trainer(callbacks):
    return Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


@cache
def trained(position, companion):
    """Three tasks with these callbacks: everything that a test needs, and what must come out."""
    torch.manual_seed(0)
    model = BackboneModule()
    merges = [MergeCallback(MagMax(scale=0.5))]
    if position == "two":
        merges.append(MergeCallback(WeightAverage()))
    base, left = weights(model), []
    for task in range(3):
        saving = ModelCheckpoint(
            mkdtemp(), monitor="val/loss", save_last=True, save_weights_only=companion == "weights only"
        )
        others = [COMPANIONS[companion](), saving]
        trainer = new_trainer([*others[:1], *merges, saving] if position == "last" else arranged(merges, *others))
        trainer.fit(model, toy_loader(task), toy_loader(9))
        left.append(weights(model))
    taus = [{name: theta[name] - base[name] for name in base} for theta in left]
    if position == "two":  # the later callback is what is evaluated
        expected = {name: base[name] + torch.stack([tau[name] for tau in taus]).mean(dim=0) for name in base}
    else:
        expected = magmax(base, taus, scale=0.5)
    return model, merges, trainer, (saving, copy.deepcopy(saving.state_dict())), left[-1], expected


@pytest.mark.parametrize(
    ("stage", "path", "which", "position", "companion"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.exhaustive]) for case in MATRIX],
)
@pytest.mark.filterwarnings("ignore:two callbacks of this Trainer:RuntimeWarning")
def test_the_merged_model_of_all_tasks_is_evaluated_and_nothing_changes(stage, path, which, position, companion):
    model, merges, trainer, (saving, state), left, expected = trained(position, companion)
    model.load_state_dict(left)
    saving.load_state_dict(state)  # Lightning restores its older state when it evaluates
    given = list(trainer.callbacks)
    if which == "new Trainer":
        beside = COMPANIONS[companion]()
        trainer = new_trainer([beside, *merges, saving] if position == "last" else arranged(merges, beside, saving))
    before = [merge.merged_state() for merge in merges]
    model.inside.clear()
    found = {"no path": None, "explicit": state["best_model_path"]}.get(path, path)
    getattr(trainer, stage)(model, toy_loader(5), ckpt_path=found)

    assert which == "new Trainer" or trainer.callbacks == given
    assert [merge.num_tasks for merge in merges] == [3] * len(merges)
    for merge, merged in zip(merges, before, strict=True):
        torch.testing.assert_close(merge.merged_state(), merged, rtol=0, atol=0)
    assert len(model.inside) == 3
    for inside in model.inside:
        torch.testing.assert_close(inside, expected, rtol=1e-5, atol=1e-6)
    if found is not None:
        kept = torch.load(state["last_model_path" if path == "last" else "best_model_path"], weights_only=True)
        # Lightning's average of weights, where it has seen the fit, restores what was averaged.
        restored = "current_model_state" if companion == "EMA" and which == "same Trainer" else "state_dict"
        left = dict(kept[restored])
    torch.testing.assert_close(weights(model), left, rtol=0, atol=0)


def test_the_quick_slice_has_every_value_of_every_axis():
    for values, seen in zip([STAGES, PATHS, TRAINERS, POSITIONS, COMPANIONS], zip(*QUICK, strict=True), strict=True):
        assert set(seen) == set(values)


@pytest.mark.parametrize("companion", ["EMA", "early stopping"])
def test_without_a_model_the_merged_one_is_tested_too(companion):
    """Lightning takes the best checkpoint then."""
    model, (merge,), trainer, (saving, state), left, expected = trained("first", companion)
    model.load_state_dict(left)
    saving.load_state_dict(state)
    model.inside.clear()
    trainer.test(dataloaders=toy_loader(5))
    assert merge.num_tasks == 3
    torch.testing.assert_close(model.inside[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("companion", ["EMA", "unfreezing"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_new_process_evaluates_the_merges_that_a_checkpoint_holds(stage, companion):
    _, _, _, (saving, state), _, expected = trained("first", companion)
    for path in (state["best_model_path"], state["last_model_path"]):
        model, merge = BackboneModule(), MergeCallback(MagMax(scale=0.5))
        getattr(new_trainer([merge, saving]), stage)(model, toy_loader(5), ckpt_path=path)
        torch.testing.assert_close(model.inside[0], expected, rtol=1e-5, atol=1e-6)
        assert (merge.num_tasks, merge.base) == (0, {}), "evaluation changes nothing"


def test_a_new_process_is_told_that_a_checkpoint_of_weights_holds_no_merges():
    _, _, _, (_, state), _, _ = trained("first", "weights only")
    path = state["last_model_path"]
    model, merge = BackboneModule(), MergeCallback(MagMax(scale=0.5))
    with pytest.warns(RuntimeWarning, match="its un-merged weights are evaluated"):
        new_trainer([merge]).test(model, toy_loader(5), ckpt_path=path)
    kept = torch.load(path, weights_only=True)["state_dict"]
    torch.testing.assert_close(model.inside[0], dict(kept), rtol=0, atol=0)


def test_checkpoints_keep_everything_but_the_merge_as_it_was_written(tmp_path):
    torch.manual_seed(0)
    model, merge = BackboneModule(), MergeCallback(MagMax())
    written = {}

    class Remember(ModelCheckpoint):
        def on_train_end(self, trainer, pl_module):
            super().on_train_end(trainer, pl_module)
            for path in Path(self.dirpath).glob("*.ckpt"):
                written[path] = torch.load(path, weights_only=True)

    saving = Remember(tmp_path, monitor="val/loss", save_top_k=2, save_last="link")
    new_trainer([merge, saving]).fit(model, toy_loader(0), toy_loader(9))
    assert len(written) == 3
    assert Path(saving.last_model_path).is_symlink()
    for path, before in written.items():
        after = torch.load(path, weights_only=True)
        key = merge.state_key
        states = [found["callbacks"].pop(key) for found in (before, after)]
        assert [(state["num_tasks"], state["pending"]) for state in states] == [(0, True), (1, False)]
        leaves = [tree_flatten(found) for found in (before, after)]
        assert leaves[0][1] == leaves[1][1], "the same keys"
        for one, other in zip(leaves[0][0], leaves[1][0], strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert not list(tmp_path.glob("*tmp*")), "nothing is left over"
