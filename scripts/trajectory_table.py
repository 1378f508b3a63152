"""Compare averages along a task by what merging their task vectors gives, on two streams; print the tables.

python scripts/trajectory_table.py --data FOLDER --work WORK [--seeds 0 1 2] [--only print]

The streams are the quickstart's digits and five small grey data sets (--data as for scripts/methods_data.py), both with
the embedded nano CLIP, experts of one base model, and a tenth of the training images held out. No rule changes the
training, so that one run of a stream, a seed and a learning rate gives the vectors of all rules. What is finished under
WORK is not repeated. The figures are written to WORK/trajectory.json; `--only print` reads them, or those of --results,
and trains nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from table_runs import spread

os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from clmerge.runs.learner import Learner

STREAMS = ("digits", "grey")
RATES = {"digits": 2e-4, "grey": 3e-4}
CONSTANT = 4.0  # times the stream's rate, where it does not fall
KINDS = {"": "", "constant": f", constant rate, {CONSTANT:g} times as high"}
EPOCHS, NUM_GREY = 5, 500  # training images of every grey data set
RULES = {
    "last": "last weights",
    "mean": "`Mean`, every step of the second half",
    "ema": "`EMA(0.99, warmup)`",
    "latest": "`Latest(3)`, epochs",
    "valley": "`LossValley`",
    "accepting": "`Accepting`",
    "horizons": "`Horizons` of 0, 0.9, 0.97, 0.99",
}
LABELS = {"experts": "experts", "weight_average": "mean", "task_arithmetic": "TA 0.3", "ties": "TIES", "tsvm": "TSV-M"}


def learner_of(stream: str, kind: str, seed: int, work: Path) -> Learner:
    """Return a learner of a stream."""
    import torch

    from clmerge.merging import WeightAverage
    from clmerge.models import OpenClip
    from clmerge.runs.learner import Learner
    from clmerge.streams import ClassIncremental, NpzSource, SklearnDigits, StreamDataModule, TaskIncremental
    from clmerge.training.module import ContinualClassifier

    torch.manual_seed(seed)
    if stream == "digits":
        from clmerge.streams.stream import Stream

        tasks: Stream = ClassIncremental(SklearnDigits(), num_tasks=5, val_fraction=0.1, seed=seed)
    else:
        from science.plan import stream_config

        given = stream_config("grey", work)["stream"]["init_args"]["sources"]
        sources = [NpzSource(**one["init_args"]) for one in given]
        tasks = TaskIncremental(sources, name="grey", val_fraction=0.1, seed=seed)
    module = ContinualClassifier(
        OpenClip(),
        loss_classes="all" if stream == "digits" else "current",
        optimizer=partial(torch.optim.AdamW, lr=RATES[stream] * (CONSTANT if kind else 1.0), weight_decay=0.0),
        schedule="constant" if kind else "cosine",
    )
    data = StreamDataModule(32, seed=seed)
    return Learner(tasks, module, WeightAverage(), data, start_policy="base", evaluate_every=5, seed=seed)


def train(stream: str, kind: str, seed: int, work: Path) -> None:
    """Train a run, merge what every rule makes of it, and write the figures down."""
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from clmerge.callbacks import TrajectoryAverage
    from clmerge.deploy.predictors import Merged, Predictor
    from clmerge.deploy.running_merge import RunningMerge
    from clmerge.merging import TIES, TSVM, TaskArithmetic, WeightAverage
    from clmerge.results.run_folder import RunFolder
    from clmerge.training.trajectory import EMA, Accepting, Horizons, Latest, LossValley, Mean, TrajectoryRule
    from clmerge.weights.swap import swapped

    out = work / f"{stream}-{kind}{seed}.json"
    if out.is_file():
        return
    learner = learner_of(stream, kind, seed, work)
    rules: dict[str, TrajectoryRule] = {
        "last": EMA(0.0),
        "mean": Mean(start=0.5, every=1),
        "ema": EMA(0.99, warmup=True),
        "latest": Latest(3),
        "valley": LossValley(),
        "accepting": Accepting(),
        "horizons": Horizons([0.0, 0.9, 0.97, 0.99]),
    }
    assert list(rules) == list(RULES)

    def score(module: LightningModule) -> float:
        return learner.score([learner.data.task])

    class Stored(TrajectoryAverage):
        """Keeps the average of every fit, and leaves the fit's weights as they are."""

        def __init__(self, rule: TrajectoryRule) -> None:
            self.found: list[dict[str, Tensor]] = []
            super().__init__(rule, score=score)

        @property
        def state_key(self) -> str:
            return repr(self.rule)

        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            self._forget()

        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pass

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if isinstance(self.rule, LossValley):
                self.rule.judge(float(trainer.callback_metrics[self.rule.monitor]))

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            if isinstance(self.rule, Accepting):
                with swapped(pl_module, self.rule.candidate()):
                    self.rule.judge(score(pl_module))

        def _put_in_place(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self._done = True
            if choices := self.rule.choices():
                self._choose(choices, score, trainer, pl_module)
            self.found.append({name: tensor.clone() for name, tensor in self.rule.compute().items()})

    averages = {name: Stored(rule) for name, rule in rules.items()}
    shutil.rmtree(work / "run", ignore_errors=True)

    def build(**given: Any) -> Trainer:
        callbacks = [*given.pop("callbacks"), *averages.values()]
        options = {"max_epochs": EPOCHS, "val_check_interval": 0.5, "log_every_n_steps": 1000} | given
        return Trainer(accelerator="cpu", callbacks=callbacks, **options)

    learner.fit(RunFolder.create(work / "run"), trainer=build, progress=False)
    base, module = learner.merge.base, learner.module
    figures: dict[str, dict[str, float]] = {name: {} for name in rules}
    predictors: dict[str, Predictor] = {}
    trainer = build(callbacks=[], logger=False, enable_checkpointing=False, enable_progress_bar=False)
    own: dict[str, list[float]] = {name: [] for name in rules}
    for task in range(len(learner.tasks)):
        vectors = {name: {key: one.found[task][key] - base[key] for key in base} for name, one in averages.items()}
        experts = {name: Merged(learner.merge.weights_with(tau, module)) for name, tau in vectors.items()}
        rows = learner.evaluate(trainer, experts, task, on=[task])
        for name, row in rows.items():
            own[name].append(row["task_aware"][task])
    for name, one in averages.items():
        merge = RunningMerge([WeightAverage(), TaskArithmetic(scale=0.3), TIES(), TSVM()], base=base)
        merge.start(module, module.trained_names)
        for task, found in enumerate(one.found):
            merge.fold({key: found[key] - base[key] for key in base}, module, task=task)
        figures[name]["experts"] = statistics.mean(own[name])
        predictors |= {f"{name}/{label}": merge.predictor(label, module) for label in merge.mergers}
    with torch.no_grad():
        rows = learner.evaluate(trainer, predictors, len(learner.tasks) - 1)
    for place, row in rows.items():
        name, label = place.split("/")
        figures[name][label] = statistics.mean(row["task_agnostic"])
    out.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{stream} {kind} {seed}", file=sys.stderr, flush=True)


def collected(work: Path, seeds: list[int]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return table -> rule -> figure -> its values by seed, of what is finished for all seeds."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for stream in STREAMS:
        for kind, told in KINDS.items():
            files = [work / f"{stream}-{kind}{seed}.json" for seed in seeds]
            if all(file.is_file() for file in files):
                rows = [json.loads(file.read_text()) for file in files]
                found[stream + told] = {
                    rule: {key: [row[rule][key] for row in rows] for key in rows[0][rule]} for rule in rows[0]
                }
    return found


def table(title: str, figures: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Return a table as Markdown: means over the seeds with the standard deviation."""
    lines = [f"| {title} | {' | '.join(LABELS.values())} |", f"|---|{'---|' * len(LABELS)}"]
    for rule, row in figures.items():
        cells = [spread(row[k]) for k in LABELS]
        lines.append(f"| {RULES[rule]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["print"])
    parser.add_argument("--results", type=Path, help="figures of an earlier call")
    options = parser.parse_args()
    if options.results:
        figures = json.loads(options.results.read_text())
    else:
        if options.work is None:
            parser.error("expected --work, or --results")
        work = options.work.resolve()
        if options.only is None:
            if options.data is None:
                parser.error("expected --data, the folder of the data sets")
            if not (work / "grey" / "mnist.npz").is_file():
                from methods_data import write_grey

                write_grey(options.data, work / "grey", seed=0, num_train=NUM_GREY)
            for kind in KINDS:
                for stream in STREAMS:
                    for seed in options.seeds:
                        train(stream, kind, seed, work)
        figures = collected(work, options.seeds)
        (work / "trajectory.json").write_text(json.dumps(figures, indent=1) + "\n")
    print("\n\n".join(table(title, rows) for title, rows in figures.items()))


if __name__ == "__main__":
    main()
