"""Measure what the harness costs over a bare PyTorch loop with the same model, data and batch, in one run.

python scripts/bench_fit.py [--batch 128] [--rounds 5] [--epochs 4] [--threads 2]

Rounds of both take turns, so that a busy machine disturbs them alike; the table gives the median over the rounds, and
the median of the rounds' ratios, to the bare training step for what the bare loop does not have. A training step is
everything in an epoch: fetching, augmenting, forward, backward, optimizer, schedule, logging; the first epoch of every
round is left out as warm-up. What an epoch and a task cost once (checkpoints; building the Trainer, merging, commit)
have their own rows.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from typing_extensions import override

from clmerge import ContinualClassifier, Learner
from clmerge.deploy.predictors import Merged
from clmerge.evaluation.evaluate import evaluate
from clmerge.lightning_compat import quiet_lightning
from clmerge.merging import TIES, MagMax
from clmerge.models import OpenClip
from clmerge.results.run_folder import RunFolder
from clmerge.streams import ClassIncremental, SklearnDigits, StreamDataModule
from clmerge.training.module import lr_factor


class Clock(Callback):
    """Time the steps of the epochs after the first, what lies between these epochs, and all epochs together."""

    def __init__(self) -> None:
        self.started = self.ended = 0.0
        self.began = self.in_epochs = 0.0
        self.in_steps = self.between = 0.0
        self.steps = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: object) -> None:
        self.began = time.perf_counter()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: object) -> None:
        self.in_epochs = time.perf_counter() - self.began

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: object) -> None:
        self.started = time.perf_counter()
        if trainer.current_epoch > 1:
            self.between += self.started - self.ended

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        self.ended = time.perf_counter()
        if trainer.current_epoch > 0:
            self.in_steps += self.ended - self.started
            self.started = self.ended
            self.steps += 1


def build(batch: int) -> Learner:
    """Return a learner of one task: all ten digits, the embedded CLIP, two mergers."""
    torch.manual_seed(0)
    optimizer = partial(AdamW, lr=2e-4, weight_decay=0.0)
    module = ContinualClassifier(OpenClip("nano"), loss_classes="all", optimizer=optimizer)
    stream = ClassIncremental(SklearnDigits(), num_tasks=1, val_fraction=0.0)
    return Learner(stream, module, [MagMax(), TIES()], StreamDataModule(batch))


def harness(batch: int, epochs: int) -> dict[str, float]:
    """Return seconds per step, per evaluated image and per task of the harness."""
    clock = Clock()

    def trainer(**given: object) -> Trainer:
        callbacks = [*given.pop("callbacks"), clock]  # type: ignore[misc]
        return Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, **given)

    with tempfile.TemporaryDirectory() as folder:
        learner = build(batch)
        results = learner.fit(
            RunFolder.create(Path(folder, "run")),
            trainer=trainer,
            loggers=[CSVLogger(folder, name="csv")],
            progress=False,
        )
        per_step, per_epoch = clock.in_steps / clock.steps, clock.between / (epochs - 2)
        once = results.seconds["train"] + results.seconds["merge"] - clock.in_epochs
        learner.data.setup_stream(learner.stream, None, learner.module.backbone.eval_transform)
        images = len(learner.stream.dataset(0, "test"))
        times = []
        for _ in range(3):
            started = time.perf_counter()
            evaluate(
                Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False),
                learner.module,
                {"expert": Merged()},
                learner.data,
                task_classes=[task.classes for task in learner.tasks],
                num_classes=10,
            )
            times.append((time.perf_counter() - started) / images)
    return {"step": per_step, "first image": times[0], "image": min(times[1:]), "epoch": per_epoch, "task": once}


def bare(batch: int, epochs: int) -> dict[str, float]:
    """Return the same figures of a plain loop."""
    learner = build(batch)
    backbone, stream = learner.module.backbone, learner.stream
    learner.module.begin_stream(10, stream.class_prompts)
    model, head = backbone, learner.module.head
    data = DataLoader(stream.dataset(0, "train", backbone.train_transform), batch, shuffle=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(parameters, lr=2e-4, weight_decay=0.0)
    schedule = LambdaLR(optimizer, partial(lr_factor, total=epochs * len(data), warmup=0, cosine=True))
    model.train()
    seconds, steps = 0.0, 0
    for epoch in range(epochs):
        started = time.perf_counter()
        for images, labels in data:
            loss = functional.cross_entropy(head(model(images)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            steps += epoch > 0
        if epoch > 0:
            seconds += time.perf_counter() - started
    model.eval()
    test = stream.dataset(0, "test", backbone.eval_transform)
    times = []
    with torch.no_grad():
        for _ in range(3):
            started = time.perf_counter()
            correct = sum(int((head(model(x)).argmax(1) == y).sum()) for x, y in DataLoader(test, batch))
            times.append((time.perf_counter() - started) / len(test))
    assert correct > 0
    return {"step": seconds / steps, "first image": times[0], "image": min(times[1:]), "epoch": 0.0, "task": 0.0}


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4, help="epochs a round, at least 3; the first is not timed")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet_lightning()
    torch.set_num_threads(options.threads)
    rounds = []
    for number in range(options.rounds):
        order = (bare, harness) if number % 2 else (harness, bare)
        figures = {measure.__name__: measure(options.batch, options.epochs) for measure in order}
        rounds.append(figures)
        print(f"round {number + 1} of {options.rounds} done", file=sys.stderr, flush=True)
    names = {
        "step": f"training step, batch {options.batch}",
        "first image": "evaluated image, first evaluation",
        "image": "evaluated image, later ones",
        "epoch": "once per epoch: checkpoint, progress",
        "task": "once per task: Trainer, merging, commit",
    }
    print("| | bare loop, ms | clmerge, ms | ratio |\n|---|---|---|---|")
    for key, name in names.items():
        plain, ours = ([r[kind][key] * 1000 for r in rounds] for kind in ("bare", "harness"))
        against = plain if plain[0] else [r["bare"]["step"] * 1000 for r in rounds]
        ratio = statistics.median(b / a for a, b in zip(against, ours, strict=True))
        print(f"| {name} | {statistics.median(plain):.2f} | {statistics.median(ours):.2f} | {ratio:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
