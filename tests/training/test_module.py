import csv
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from support.toy_backbone import ToyBackbone
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from clmerge.models import CosineHead, LinearHead, OpenClip, Partial
from clmerge.streams.samplers import ShardSampler
from clmerge.training.module import ContinualClassifier, lr_factor

PROMPTS = [[f"class {c}", f"a {c}"] for c in range(5)]
ADAM = partial(torch.optim.AdamW, lr=0.02)


@pytest.fixture
def make(clip):
    """Build a classifier over five classes."""

    def build(head=None, *, task=None, **options):
        torch.manual_seed(0)
        module = ContinualClassifier(OpenClip(clip), head, **options)
        module.begin_stream(5, PROMPTS)
        if task is not None:
            module.begin_task(task)
        return module

    return build


def loader(classes=(1, 3), num=16, batch_size=8, seed=0):
    """Images whose brightness tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes)[torch.arange(num) % len(classes)]
    images = torch.randn(num, 3, 8, 8, generator=generator) + labels[:, None, None, None]
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


def trainer(*callbacks, **options):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, "max_epochs": 2, **options})


def whole_loss(module, batches):
    with torch.no_grad():
        return float(sum(module.loss(module(images), labels) for images, labels in batches))


# What is trained --------------------------------------------------------------------------------------------


def test_only_the_image_tower_is_trained_by_default(make):
    module = make()
    names = [name for name, _ in module.named_parameters()]
    image_tower = {name for name in names if name.startswith("backbone.model.visual.")}
    assert len(image_tower) < len(names)
    assert set(module.trained_names) == image_tower
    assert {name for name, p in module.named_parameters() if p.requires_grad} == image_tower


def test_a_tuning_chooses_what_is_trained(make):
    module = make(tuning=Partial(["visual.transformer.resblocks.1.*", "visual.proj"]))
    expected = {
        f"backbone.model.{name}"
        for name, _ in module.backbone.model.named_parameters()
        if name.startswith("visual.transformer.resblocks.1.") or name == "visual.proj"
    }
    assert set(module.trained_names) == expected
    assert {name for name, p in module.named_parameters() if p.requires_grad} == expected


def test_a_fit_learns_the_task_and_leaves_the_rest_bit_for_bit(make):
    module = make(task=(1, 3), optimizer=ADAM)
    batches = loader()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    first = whole_loss(module, batches)
    run = trainer(max_epochs=15)
    run.fit(module, batches)
    (group,) = run.optimizers[0].param_groups
    assert len(group["params"]) == len(module.trained_names)
    assert whole_loss(module, batches) < 0.5 * first
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= set(module.trained_names)
    assert "backbone.model.visual.proj" in changed


def test_a_growing_head_is_trained_along_and_its_old_block_is_not(make):
    module = make(LinearHead(), task=(0, 2), optimizer=ADAM)
    trainer().fit(module, loader((0, 2)))
    module.begin_task((1, 3))
    old, new = (block.detach().clone() for block in module.head.blocks)
    trainer().fit(module, loader((1, 3)))
    assert torch.equal(module.head.blocks[0], old)
    assert not torch.equal(module.head.blocks[1], new)
    assert not any(name.startswith("head.") for name in module.trained_names)


def test_all_blocks_are_trained_where_all_seen_classes_compete(make):
    module = make(LinearHead(), task=(0, 2), loss_classes="seen")
    module.begin_task((1, 3))
    assert all(block.requires_grad for block in module.head.blocks)


# Loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_classes", "columns"), [("current", [1, 4]), ("seen", [0, 1, 3, 4]), ("all", [0, 1, 2, 3, 4])]
)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_the_cross_entropy_over_the_named_classes(make, loss_classes, columns, smoothing):
    module = make(task=(3, 0), loss_classes=loss_classes, label_smoothing=smoothing)
    module.begin_task((4, 1))
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([4, 1, 1, 4, 4, 1])
    total = 0.0
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(row[c]) for c in columns))
        losses = {c: log_sum - float(row[c]) for c in columns}
        mean = sum(losses.values()) / len(columns)
        total += (1 - smoothing) * losses[label] + smoothing * mean
    assert float(module.loss(logits, labels)) == pytest.approx(total / 6, rel=1e-5)


@pytest.mark.parametrize("head", [LinearHead(), CosineHead()])
def test_all_classes_cannot_compete_before_a_head_knows_them(make, head):
    with pytest.raises(ValueError, match=f"with {type(head).__name__}, got 'all'"):
        make(head, loss_classes="all")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"warmup_steps": -1}, "warmup_steps of 0 or more, got -1"), ({"label_smoothing": 1.0}, "label_smoothing in")],
)
def test_settings_out_of_range_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_validation_scores_the_current_task(make):
    module = make(task=(1, 3))
    images = loader().dataset.tensors[0]
    logits = module.eval()(images).detach()
    predicted = torch.where(logits[:, 1] > logits[:, 3], 1, 3)
    labels = torch.where(torch.arange(16) < 12, predicted, 4 - predicted)
    run = trainer()
    run.validate(module, DataLoader(TensorDataset(images, labels), batch_size=5), verbose=False)
    assert float(run.callback_metrics["val/accuracy"]) == pytest.approx(12 / 16)
    loss = functional.cross_entropy(logits[:, [1, 3]], (labels == 3).long())
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(float(loss), rel=1e-5)


# Learning rate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 3, 12])
@pytest.mark.parametrize("cosine", [True, False])
def test_learning_rate_factor(warmup, cosine):
    total = 10
    for step in range(total + 2):
        if step < warmup:
            expected = (step + 1) / warmup
        elif not cosine:
            expected = 1.0
        elif step >= total:
            expected = 0.0
        else:
            expected = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (total - warmup))
        found = lr_factor(step, total=total, warmup=warmup, cosine=cosine)
        if warmup < total:
            assert found == pytest.approx(expected, abs=1e-12)
        elif step < total:  # no step is left for anything after the warm-up
            assert found == (step + 1) / warmup


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"] / 0.02)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.0, 0.5 + 0.25 * 2**0.5, 0.5, 0.5 - 0.25 * 2**0.5]),
        ({"warmup_steps": 2}, [0.5, 1.0, 1.0, 0.5]),
        ({"schedule": "constant"}, [1.0] * 4),
        ({"schedule": "constant", "warmup_steps": 2}, [0.5, 1.0, 1.0, 1.0]),
    ],
)
def test_a_fit_follows_the_schedule_over_the_steps_of_the_task(make, options, expected):
    rates = Rates()
    trainer(rates).fit(make(task=(1, 3), optimizer=ADAM, **options), loader())
    assert rates.seen == pytest.approx(expected)


def test_a_warmup_longer_than_the_task_warns_how_far_it_gets(make):
    module = make(task=(1, 3), warmup_steps=16)
    with pytest.warns(UserWarning, match="warmup_steps=16 is not shorter than the 4 steps .* reaches 25%"):
        trainer().fit(module, loader())


class StopAfterOneEpoch(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


def test_a_cosine_over_an_endless_fit_is_refused(make):
    endless = partial(trainer, StopAfterOneEpoch(), max_epochs=-1)
    with pytest.raises(ValueError, match="got an endless one; set the Trainer's max_epochs"):
        endless().fit(make(task=(1, 3)), loader())
    constant = endless()
    constant.fit(make(task=(1, 3), schedule="constant", warmup_steps=3), loader())
    assert constant.global_step == 2


# Tasks ------------------------------------------------------------------------------------------------------


def test_epochs_go_on_counting_over_tasks_in_the_loggers(make, tmp_path):
    module = make(task=(1, 3))
    logger = CSVLogger(tmp_path, name="csv", version=0)
    for task in range(2):
        module.epoch_offset = 2 * task
        trainer(logger=logger, log_every_n_steps=1).fit(module, loader(), loader(seed=1))
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    train = [float(row["epoch"]) for row in rows if row["train/loss"]]
    val = [float(row["epoch"]) for row in rows if row["val/loss"]]
    assert train == [0, 0, 1, 1, 2, 2, 3, 3]
    assert val == [0, 1, 2, 3]


class Recording(CosineHead):
    def add_classes(self, classes, prototypes=None):
        self.given = prototypes
        super().add_classes(classes, prototypes)


def test_prototypes_start_at_the_class_means_of_normalised_features(make):
    module = make(Recording())
    module.train()
    module.backbone.model.visual.eval()
    batches = loader((3, 1), num=10, batch_size=4)
    module.begin_task((3, 1), batches)
    images, labels = batches.dataset.tensors
    with torch.no_grad():
        features = functional.normalize(module.backbone(images), dim=-1)
    means = torch.stack([features[labels == c].mean(dim=0) for c in (1, 3)])
    torch.testing.assert_close(module.head.given, means)
    rows = means / means.norm(dim=1, keepdim=True)
    torch.testing.assert_close(module.head.blocks[0].detach(), rows)
    assert module.head.known.tolist() == [1, 3]
    assert module.backbone.training
    assert not module.backbone.model.visual.training


def test_prototypes_are_taken_in_evaluation_mode(make):
    module = make(CosineHead())
    module.backbone.model.visual.ln_post = nn.Sequential(module.backbone.model.visual.ln_post, nn.Dropout(0.5))
    module.train()
    module.begin_task((1, 3), loader())
    twin = make(CosineHead())
    twin.begin_task((1, 3), loader())
    assert torch.equal(module.head.blocks[0], twin.head.blocks[0])


def test_prototypes_need_images_of_every_class(make):
    with pytest.raises(ValueError, match="none of class 2"):
        make(CosineHead()).begin_task((1, 2, 3), loader((1, 3)))
    with pytest.raises(ValueError, match="for a CosineHead, got none"):
        make(CosineHead()).begin_task((1, 3))


def test_a_resumed_task_counts_as_seen_and_as_current(make):
    module = make(task=(2, 0), loss_classes="seen")
    twin = make(loss_classes="seen")
    twin.resume_tasks([(3, 4), (1, 4)])
    twin.resume_tasks([(2, 0)])
    for one in (module, twin):
        one.begin_task((1, 3))
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    assert torch.equal(twin.loss(logits, labels), module.loss(logits, labels))
    assert torch.equal(twin.loss(logits, labels), functional.cross_entropy(logits[:, :4], labels))


def test_a_resumed_growing_head_takes_its_blocks_from_the_saved_weights(make):
    module = make(LinearHead(), task=(2, 0))
    module.begin_task((1,))
    twin = make(LinearHead())
    twin.resume_tasks([(2, 0), (1,)])
    twin.load_state_dict(module.state_dict())
    images = loader().dataset.tensors[0]
    assert torch.equal(twin(images), module(images))
    assert twin(images)[:, [3, 4]].max() == -math.inf


class Shares(LightningDataModule):
    """Eight training images, and seven for validation, of which two processes have four and three."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(15, 3, 4, 4, generator=generator)
        self.labels = torch.arange(15) % 3

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.images[:8], self.labels[:8]), batch_size=8 // self.trainer.world_size)

    def val_dataloader(self):
        images = TensorDataset(self.images[8:], self.labels[8:])
        placement = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        return DataLoader(images, batch_size=2, sampler=ShardSampler(images, **placement))


def logged(**options):
    """Fit one step with a learning rate of zero; return what was logged, and the rank."""
    torch.manual_seed(0)
    backbone = ToyBackbone()
    backbone.model = backbone.model[:2]  # without batch norm and dropout
    module = ContinualClassifier(backbone, LinearHead(), optimizer=partial(torch.optim.SGD, lr=0.0))
    module.begin_stream(3)
    module.begin_task(range(3))
    module.epoch_offset = 4
    runner = trainer(max_epochs=1, log_every_n_steps=1, **options)
    runner.fit(module, datamodule=Shares())
    return {name: float(value) for name, value in runner.callback_metrics.items()}, runner.global_rank


LOGGED = """
import json, sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
from training.test_module import logged

found, rank = logged(strategy="ddp", devices=2)
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_with_uneven_shares_log_the_figures_of_one(tmp_path):
    (tmp_path / "script.py").write_text(LOGGED)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
        timeout=240,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected, _ = logged()
    assert expected["epoch"] == 4
    assert 0 < expected["val/accuracy"] < 1
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["epoch"] == expected["epoch"]
        assert found["val/accuracy"] == expected["val/accuracy"]
        assert found == pytest.approx(expected, abs=1e-5), "the mean over all images, whoever had them"


def test_a_validation_loss_that_is_not_a_number_is_shown(make):
    module = make(task=(1, 3))
    images, labels = loader().dataset.tensors
    images[0] = math.nan
    run = trainer()
    run.validate(module, DataLoader(TensorDataset(images, labels), batch_size=5), verbose=False)
    assert math.isnan(run.callback_metrics["val/loss"])
