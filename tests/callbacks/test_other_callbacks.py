"""Callbacks and modules that change weights themselves, beside a MergeCallback."""

import copy

import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from support.foreign import BackboneModule, weights
from support.tiny import toy_loader
from torch import nn

from clmerge.callbacks import MergeCallback
from clmerge.merging import TIES, MagMax, TaskArithmetic

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def new_trainer(*callbacks, epochs=2):
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BackboneModule()


def set_weights(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


# What the fit leaves is what is merged ---------------------------------------------------------------------------


class ReloadCallback(Callback):
    """Puts other weights in at the end of training, as a callback that reloads the best ones does."""

    def __init__(self, hook):
        setattr(self, hook, lambda trainer, pl_module: set_weights(pl_module, 0.5))


class ReloadModule(BackboneModule):
    """Does so in its own hook, which Lightning calls after those of all callbacks."""

    def on_train_end(self):
        set_weights(self, 0.5)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("by", ["EMA", "SWA", "on_train_end", "on_fit_end", "module"])
def test_what_the_fit_leaves_is_what_is_merged(by, first):
    torch.manual_seed(0)
    model = ReloadModule() if by == "module" else BackboneModule()
    other = {
        "EMA": lambda: EMAWeightAveraging(decay=0.9),
        "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
        "module": Callback,
    }.get(by, lambda: ReloadCallback(by))()
    merge = MergeCallback(TaskArithmetic(scale=1.0))
    new_trainer(*([merge, other] if first else [other, merge]), epochs=3).fit(model, toy_loader(0))
    torch.testing.assert_close(merge.merged_state(), weights(model), rtol=1e-6, atol=1e-6)


def test_running_statistics_that_weight_averaging_estimates_are_left_in_place():
    torch.manual_seed(0)
    model = BackboneModule()
    model.backbone = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
    merge = MergeCallback(TaskArithmetic(scale=1.0))
    new_trainer(merge, StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1), epochs=3).fit(model, toy_loader(0))
    assert merge.num_tasks == 1
    torch.testing.assert_close(merge.merged_state(), weights(model), rtol=1e-6, atol=1e-6)


def test_an_average_of_an_earlier_fit_is_refused_before_training(model):
    merge, ema = MergeCallback(MagMax()), EMAWeightAveraging(decay=0.5)
    new_trainer(merge, ema).fit(model, toy_loader(0))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"expected a new EMAWeightAveraging for every fit.*TrajectoryAverage"):
        new_trainer(merge, ema).fit(model, toy_loader(1))
    torch.testing.assert_close(model.state_dict(), before)
    new_trainer(merge, EMAWeightAveraging(decay=0.5)).fit(model, toy_loader(1))
    assert merge.num_tasks == 2


def test_an_average_that_took_in_nothing_is_refused(model):
    merge = MergeCallback(MagMax())
    late = EMAWeightAveraging(decay=0.5, update_starting_at_step=10**6)
    with pytest.raises(RuntimeError, match=r"to take in weights, got a fit that ended before.*TrajectoryAverage"):
        new_trainer(merge, late).fit(model, toy_loader(0))
    assert merge.num_tasks == 0


def test_an_average_whose_fit_was_killed_before_its_merge_is_refused(model, tmp_path):
    class Killed(Callback):
        def on_train_end(self, trainer, pl_module):
            raise RuntimeError("killed")

    def trainer(*callbacks):
        return Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )

    def parts():
        saving = ModelCheckpoint(dirpath=tmp_path, filename="last", enable_version_counter=False)
        return MergeCallback(MagMax(), base=base), EMAWeightAveraging(decay=0.5), saving

    base = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with pytest.raises(RuntimeError, match="killed"):
        trainer(Killed(), *parts()).fit(model, toy_loader(0))
    with pytest.raises(RuntimeError, match=r"resumed after its last epoch.*TrajectoryAverage"):
        trainer(*parts()).fit(model, toy_loader(0), ckpt_path=tmp_path / "last.ckpt")


# Swaps -----------------------------------------------------------------------------------------------------------


class Swapper(Callback):
    """A stranger's callback that evaluates its own weights: it stores what it finds and puts it back, hook by hook."""

    def __init__(self, level, stage="test"):
        self.inside = {}
        setattr(self, f"on_{stage}{level}_start", self.swap_in)
        setattr(self, f"on_{stage}{level}_end", self.swap_out)

    def swap_in(self, trainer, pl_module, *args):
        self.kept = weights(pl_module)
        set_weights(pl_module, 7.0)

    def swap_out(self, trainer, pl_module, *args):
        self.inside = weights(pl_module)
        pl_module.load_state_dict(self.kept)


@pytest.mark.parametrize("level", ["", "_epoch"])
@pytest.mark.parametrize("arrangement", ["ms", "sm", "msm", "smm", "mms"])
@pytest.mark.filterwarnings("ignore:two callbacks of this Trainer:RuntimeWarning")
def test_other_swappers_neither_hide_the_merged_weights_nor_keep_them(model, level, arrangement):
    merges = [MergeCallback(TaskArithmetic(scale=0.4)), MergeCallback(TIES())][: arrangement.count("m")]
    new_trainer(*merges).fit(model, toy_loader(0))
    before, swapper, rest = weights(model), Swapper(level), list(merges)
    callbacks = [swapper if letter == "s" else rest.pop(0) for letter in arrangement]
    new_trainer(*callbacks).test(model, toy_loader(1))
    for inside in model.inside:
        torch.testing.assert_close(inside, merges[-1].merged_state(), rtol=0, atol=0)
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    assert all((tensor == 7).all() for tensor in swapper.inside.values()), "it found its own weights where it left them"


def test_two_callbacks_that_merge_the_same_tensors_say_which_is_tested(model):
    merges = [MergeCallback(MagMax()), MergeCallback(TIES())]
    new_trainer(*merges).fit(model, toy_loader(0))
    with pytest.warns(RuntimeWarning, match=r"into the same 4 tensors; .*the later one, MergeCallback.*ties"):
        new_trainer(*merges).test(model, toy_loader(1))


def test_two_callbacks_that_merge_different_tensors_are_both_tested(model):
    merges = [
        MergeCallback({"backbone": MagMax(scale=0.1)}, include=["backbone.*"]),
        MergeCallback({"head": MagMax(scale=0.2)}, include=["head.*"]),
    ]
    new_trainer(*merges).fit(model, toy_loader(0))
    before = weights(model)
    new_trainer(*merges).test(model, toy_loader(1))
    torch.testing.assert_close(model.inside[0], merges[0].merged_state() | merges[1].merged_state(), rtol=0, atol=0)
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:two callbacks of this Trainer:RuntimeWarning")
@pytest.mark.parametrize("at", ["on_test_start", "on_test_epoch_start", "on_test_batch_end"])
def test_an_exception_at_any_time_restores_with_several_swappers(model, at):
    merges = [MergeCallback(MagMax()), MergeCallback(TIES())]
    new_trainer(*merges).fit(model, toy_loader(0))
    before = weights(model)

    def stop(*args):
        raise KeyError("stop")

    setattr(model, at, stop)
    with pytest.raises(KeyError, match="stop"):
        new_trainer(*merges).test(model, toy_loader(1))
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("level", ["", "_epoch"])
@pytest.mark.parametrize("num_merges", [1, 2])
@pytest.mark.filterwarnings("ignore:two callbacks of this Trainer:RuntimeWarning")
def test_a_module_that_swaps_its_own_weights_in_is_no_exception(model, level, num_merges):
    """Lightning calls its hooks after those of all callbacks, before the batches as after them."""
    merges = [MergeCallback(TaskArithmetic(scale=0.4)), MergeCallback(TIES())][:num_merges]
    new_trainer(*merges).fit(model, toy_loader(0))
    before, own = weights(model), Swapper(level)
    setattr(model, f"on_test{level}_start", lambda: own.swap_in(None, model))
    setattr(model, f"on_test{level}_end", lambda: own.swap_out(None, model))
    new_trainer(*merges).test(model, toy_loader(1))
    for inside in model.inside:
        torch.testing.assert_close(inside, merges[-1].merged_state(), rtol=0, atol=0)
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


def test_weights_that_change_from_batch_to_batch_are_named(model):
    merge = MergeCallback(MagMax())
    new_trainer(merge).fit(model, toy_loader(0))
    before = weights(model)
    with pytest.warns(RuntimeWarning, match=r"got other values in 4 of 4 tensors, the first 'backbone\.0\.weight'"):
        new_trainer(merge, Swapper("_batch")).test(model, toy_loader(1))
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


def test_within_merged_the_named_merger_is_tested_by_a_trainer_with_the_callback(model):
    merge = MergeCallback([MagMax(), TIES()])
    new_trainer(merge).fit(model, toy_loader(0))
    before = weights(model)
    with merge.merged(model, "ties"):
        new_trainer(merge).test(model, toy_loader(1))
        torch.testing.assert_close(weights(model), merge.merged_state("ties"), rtol=0, atol=0)
    torch.testing.assert_close(model.inside[0], merge.merged_state("ties"), rtol=0, atol=0)
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    model.inside.clear()
    new_trainer(merge).test(model, toy_loader(1))
    torch.testing.assert_close(model.inside[0], merge.merged_state("magmax"), rtol=0, atol=0)


# Unfreezing ------------------------------------------------------------------------------------------------------


def test_a_backbone_that_is_unfrozen_may_be_all_that_is_merged(model):
    base = weights(model)
    merge = MergeCallback(TaskArithmetic(scale=1.0), include=["backbone.*"])
    for task in range(2):
        new_trainer(merge, BackboneFinetuning(unfreeze_backbone_at_epoch=1), epochs=3).fit(model, toy_loader(task))
        assert not torch.equal(model.backbone[0].weight, base["backbone.0.weight"])
    assert set(merge.base) == {"backbone.0.weight", "backbone.0.bias"}
    assert torch.equal(merge.base["backbone.0.weight"], base["backbone.0.weight"])


class Unfreezing(BackboneModule):
    """Unfreezes its backbone by itself, in a hook of its own."""

    def __init__(self, hook, epoch=1, *, warm=False):
        super().__init__()
        self.backbone.requires_grad_(warm)
        self.at = epoch
        setattr(self, hook, self.unfreeze)

    def unfreeze(self, *args):
        if self.current_epoch == self.at:
            self.backbone.requires_grad_(True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_backbone_that_the_module_unfreezes_is_merged():
    torch.manual_seed(0)
    model, merge = Unfreezing("on_train_epoch_start"), MergeCallback(TaskArithmetic(scale=1.0))
    base = weights(model)
    new_trainer(merge, epochs=3).fit(model, toy_loader(0))
    assert not torch.equal(model.backbone[0].weight, base["backbone.0.weight"])
    assert set(merge.base) == set(base)
    torch.testing.assert_close(merge.base, base, rtol=0, atol=0)
    torch.testing.assert_close(merge.merged_state(), weights(model), rtol=1e-6, atol=1e-6)


def test_a_backbone_that_is_unfrozen_too_late_is_an_error_when_it_is_unfrozen():
    torch.manual_seed(0)
    model, merge = Unfreezing("on_train_epoch_start", epoch=9), MergeCallback(MagMax())
    new_trainer(merge).fit(model, toy_loader(0))
    model.at = 1
    with pytest.raises(
        RuntimeError, match=r"of the 1 tasks that were merged without them, got 2 .*'backbone\.0\.weight'"
    ):
        new_trainer(merge).fit(model, toy_loader(1))
    assert merge.num_tasks == 1
    model, given = Unfreezing("on_train_epoch_start"), MergeCallback(MagMax(), base=merge.base)
    with pytest.raises(RuntimeError, match="of base=, which lacks them, got 2"):
        new_trainer(given).fit(model, toy_loader(0))


def test_a_backbone_that_moved_before_it_was_seen_to_be_unfrozen_is_an_error():
    torch.manual_seed(0)
    model, merge = Unfreezing("training_step"), MergeCallback(MagMax())
    plain = BackboneModule.training_step

    def training_step(batch, batch_idx):
        model.unfreeze()
        return plain(model, batch, batch_idx)

    model.training_step = training_step
    with pytest.raises(RuntimeError, match=r"not changed since the fit started, but 'backbone\.0\.weight' is"):
        new_trainer(merge).fit(model, toy_loader(0))


def test_frozen_parameters_that_change_all_the_same_are_named(model):
    class Teacher(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            pl_module.teacher.weight.data.lerp_(pl_module.head.weight.data, 0.1)

    model.teacher = nn.Linear(6, 3).requires_grad_(False)
    merge = MergeCallback(MagMax())
    with pytest.warns(RuntimeWarning, match=r"changed 1 parameters that are not merged, the first 'teacher\.weight'"):
        new_trainer(merge, Teacher()).fit(model, toy_loader(0))
    assert merge.num_tasks == 1
    new_trainer(MergeCallback(MagMax(), exclude=["teacher.*"]), Teacher()).fit(model, toy_loader(0))


def test_parameters_that_appear_during_the_fit_are_named(model):
    class Grow(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.more = nn.Linear(6, 1)

    with pytest.warns(RuntimeWarning, match=r"changed 2 parameters that are not merged, the first 'more\.weight'"):
        new_trainer(MergeCallback(MagMax()), Grow()).fit(model, toy_loader(0))


# Lightning's other package -----------------------------------------------------------------------------------------


class OtherPackageModule(pytorch_lightning.LightningModule):
    """A backbone and a head of ``pytorch_lightning``, whose classes are not those of ``lightning.pytorch``."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.head = nn.Linear(6, 3)
        self.inside = []

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx):
        self.inside.append(weights(self))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_the_other_package_of_lightning_is_no_exception(tmp_path):
    torch.manual_seed(0)
    model, merge = OtherPackageModule(), MergeCallback(TaskArithmetic(scale=0.5))
    base = weights(model)
    saving = pytorch_lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    unfreezing = pytorch_lightning.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    trainer = pytorch_lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[merge, unfreezing, saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, toy_loader(0))
    expected = {name: base[name] + 0.5 * (theta - base[name]) for name, theta in weights(model).items()}
    trainer.validate(model, toy_loader(1), ckpt_path="last")
    assert merge.num_tasks == 1
    assert not torch.equal(expected["backbone.0.weight"], base["backbone.0.weight"])
    for inside in model.inside:
        torch.testing.assert_close(inside, expected, rtol=1e-6, atol=1e-6)
    state = torch.load(saving.last_model_path, weights_only=True)["callbacks"][merge.state_key]
    assert (state["num_tasks"], state["pending"]) == (1, False)
