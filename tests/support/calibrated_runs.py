"""Learners of digits in a few tasks, with calibrations, on a CLIP of a few thousand parameters."""

import torch
from lightning.pytorch import Trainer

from clmerge import ContinualClassifier, Learner
from clmerge.merging import WeightAverage
from clmerge.models import Full, OpenClip, ZeroShotHead
from clmerge.results.run_folder import RunFolder
from clmerge.streams import ClassIncremental, SklearnDigits, StreamDataModule


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)


def learner(
    clip, *calibrations, head=None, loss=None, tuning=None, num_tasks=2, optimizer=adam, mergers=None, backbone=None
):
    torch.manual_seed(0)
    head = head or ZeroShotHead()
    module = ContinualClassifier(
        backbone or OpenClip(clip),
        head,
        tuning=tuning or Full(),
        loss_classes=loss or ("all" if head.open_vocabulary else "seen"),
        optimizer=optimizer,
    )
    stream = ClassIncremental(SklearnDigits(), num_tasks=num_tasks, val_fraction=0.1)
    mergers = mergers or [WeightAverage()]
    return Learner(stream, module, mergers, StreamDataModule(64), calibrations=list(calibrations))


def build(extra=(), **given):
    options = {"max_epochs": 1, "limit_train_batches": 3, "accelerator": "cpu"} | given
    return Trainer(**options | {"callbacks": [*given["callbacks"], *extra]})


def run(one, folder, extra=()):
    return one.fit(RunFolder.create(folder), trainer=lambda **given: build(extra, **given))
