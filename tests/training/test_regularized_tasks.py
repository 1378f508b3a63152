import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.records import record
from support.small_classifier import REGULARIZERS, weights
from support.tiny import tiny_clip

from clmerge import ContinualClassifier, Learner
from clmerge.merging import WeightAverage
from clmerge.models import Frozen, Full, LinearHead, LoRA, OpenClip, ZeroShotHead
from clmerge.models.adversary import Ball
from clmerge.results.run_folder import RunFolder
from clmerge.streams import ClassIncremental, SklearnDigits, StreamDataModule
from clmerge.training.regularizers import EWC, L2, TRADES, BadMerging, FeatureDistance, LwF

pytestmark = pytest.mark.usefixtures("no_pictures")


def learner(
    clip, *regularizers, head=None, loss="all", start_policy="previous", num_tasks=2, lr=3e-3, tuning=None, **options
):
    torch.manual_seed(0)
    module = ContinualClassifier(
        OpenClip(clip),
        head or ZeroShotHead(),
        tuning=tuning,
        loss_classes=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
        regularizers=list(regularizers),
    )
    stream = ClassIncremental(SklearnDigits(), num_tasks=num_tasks)
    return Learner(
        stream, module, WeightAverage(), StreamDataModule(64), start_policy=start_policy, statistics_images=8, **options
    )


def build(extra=(), **given):
    options = {"max_epochs": 2, "limit_train_batches": 3, "accelerator": "cpu"} | given
    return Trainer(**options | {"callbacks": [*given["callbacks"], *extra]})


def run(one, folder, extra=()):
    return one.fit(RunFolder.create(folder), trainer=lambda **given: build(extra, **given))


def state(one):
    return {name: value.clone() for name, value in one.module.state_dict().items()}


class Logged(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((float(outputs["loss"]), {k: float(v) for k, v in trainer.callback_metrics.items()}))


def test_a_training_step_minimises_the_sum_and_logs_the_parts(clip, tmp_path):
    logged = Logged()
    run(learner(clip, L2(1.0), FeatureDistance(0.5)), tmp_path / "run", [logged])
    total, parts = logged.seen[-1]
    assert total == pytest.approx(parts["train/loss"] + parts["train/l2"] + parts["train/features"], rel=1e-5)
    assert parts["train/l2"] > 0
    assert parts["train/features"] > 0


class DieOnce(Callback):
    """Stop the second task in its second epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.old_classes and trainer.current_epoch == 1 and batch_idx == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_with_the_same_bits(clip, tmp_path):
    def make():
        attack = BadMerging(task=1, target=2, images=4, epochs=1, steps=2)  # of the task in which the run is killed
        trades = TRADES(threats=[Ball("linf", 0.1), Ball("l2", 1.0)], steps=1)  # starts from random points
        return learner(clip, *(one() for one in REGULARIZERS.values()), trades, attack, num_tasks=3)

    whole, killed, resumed = make(), make(), make()
    run(whole, tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(killed, tmp_path / "killed", [DieOnce()])
    resumed.fit(RunFolder.open(tmp_path / "killed"), trainer=build)
    expected, found = state(whole), state(resumed)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert whole.module.regularizers[-1].patch.shape == (3, 1, 1)


# What it is for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "tuning"), [("base", Full), ("previous", Full), ("merged", LoRA)])
def test_all_regularizers_together_run_under_every_start_policy_and_count_their_bytes(clip, tmp_path, policy, tuning):
    one = learner(clip, *(make() for make in REGULARIZERS.values()), start_policy=policy, tuning=tuning())
    run(one, tmp_path / "run")
    sizes = record(tmp_path / "run")["bytes"]
    assert set(sizes) == {
        f"regularizer.{name}" for name in ("l2", "ewc", "ita", "iel", "lwf", "mean_teacher", "features")
    }
    numel = sum(value.numel() for value in one.merge.base.values())
    assert sizes["regularizer.l2"] == 2 * 4 * numel
    assert sizes["regularizer.ewc"] == 2 * (8 * numel + 4)
    assert sizes["regularizer.features"] == sizes["regularizer.l2"]
    assert sizes["regularizer.iel"] > sizes["regularizer.ita"] > 8 * numel


def moved(one):
    theta = dict(one.module.named_parameters())
    base = one.merge.base
    return float(sum((theta[name].detach() - base[name]).square().sum() for name in base)) ** 0.5


def test_a_strong_pull_to_the_base_keeps_the_weights_there(clip, tmp_path):
    free, held = learner(clip), learner(clip, L2(1e3, to="base"))
    run(free, tmp_path / "free")
    run(held, tmp_path / "held")
    assert moved(held) < 0.2 * moved(free)


def drift(one, folder):
    """How far the second task moves the softened old outputs on its own images."""
    outputs = {}

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            outputs["before"] = self.look(pl_module)

        def on_train_end(self, trainer, pl_module):
            outputs["after"] = self.look(pl_module)

        @torch.no_grad()
        def look(self, module):
            images = torch.cat([batch[0] for batch in one.data.eval_dataloader("train", [1])])
            old = one.tasks[0].classes
            return (module(images)[:, list(old)] / 2).log_softmax(dim=1)

    run(one, folder, [Watch()])
    before, after = outputs["before"], outputs["after"]
    return float((before.exp() * (before - after)).sum(dim=1).mean())


@pytest.mark.parametrize("head", [ZeroShotHead, LinearHead])
def test_lwf_reduces_the_drift_of_the_old_outputs(clip, tmp_path, head):
    loss = "all" if head is ZeroShotHead else "seen"
    free = drift(learner(clip, head=head(), loss=loss), tmp_path / "free")
    held = drift(learner(clip, LwF(30.0), head=head(), loss=loss), tmp_path / "held")
    assert held < 0.6 * free


def test_ewc_holds_on_to_what_the_fisher_information_is_large_for(clip, tmp_path):
    """The move of the second task, weighted by the Fisher information of the first, is smaller than without."""
    found = []
    for folder, strength in (("free", 0.0), ("held", 1e4)):
        one = learner(clip, EWC(strength))
        seen = {}

        class Watch(Callback):
            def on_train_end(self, trainer, pl_module, seen=seen):
                (ewc,) = pl_module.regularizers
                if ewc.anchor.numel():
                    theta = torch.cat([w.flatten() for w in weights(pl_module).values()])
                    seen["moved"] = float((ewc.fisher * (theta - ewc.anchor).square()).sum())

        run(one, tmp_path / folder, [Watch()])
        found.append(seen["moved"])
    assert found[1] < 0.3 * found[0]


def test_branches_start_from_one_anchor_and_a_task_ends_with_their_merge(clip, tmp_path):
    one = learner(clip, L2(1e-2), EWC(1.0, decay=1.0), branches=2)
    run(one, tmp_path / "run")
    _, ewc = one.module.regularizers
    torch.testing.assert_close(ewc.anchor, torch.cat([w.flatten() for w in weights(one.module).values()]))


def test_a_frozen_backbone_has_nothing_to_regularize(clip):
    with pytest.raises(ValueError, match="expected no regularizers for a backbone that is frozen, got 1"):
        ContinualClassifier(OpenClip(clip), LinearHead(), tuning=Frozen(), regularizers=[LwF()])


SCRIPT = """
import os, sys
from pathlib import Path
import torch
from lightning.pytorch import Trainer
from training.test_regularized_tasks import REGULARIZERS, learner
from clmerge.deploy.calibration import SampleTuning
from clmerge.models.adversary import Ball
from clmerge.results.run_folder import RunFolder
from clmerge.training.sharpness import SAM
from clmerge.weights import fingerprint

out = Path(sys.argv[1])

def build(**given):
    options = dict(max_epochs=1, limit_train_batches=2, accelerator="cpu")
    options |= dict(devices=2, strategy="ddp")
    trainer = Trainer(**options | given)
    ranks.append(trainer.global_rank)
    return trainer

ranks = []
steps = [SampleTuning(per_class=1, epochs=1)]
one = learner(sys.argv[2], *(make() for make in REGULARIZERS.values()), num_tasks=2, calibrations=steps)
one.module.optimizer_factory = SAM
main = "LOCAL_RANK" not in os.environ
one.fit(RunFolder.create(out / "run") if main else RunFolder(out / "run", writes=False), trainer=build)
tuned = one.calibrated.models(one.merged(), 1, torch.device("cpu"))["weight_average+tuned"]
(out / f"rank{ranks[0]}").write_text(fingerprint(one.module.state_dict()) + fingerprint(tuned))
"""


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_two_processes_remember_the_same(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    found = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "script.py"), str(tmp_path), tiny_clip(tmp_path / "clip")],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3]))},
    )
    assert found.returncode == 0, found.stderr[-3000:]
    prints = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert prints[0] == prints[1]
