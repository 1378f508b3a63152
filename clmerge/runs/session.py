"""A stream, a classifier and its data: how every command evaluates, scores and measures."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from clmerge.deploy.adapting import adaptation_losses
from clmerge.deploy.learning import Loss, Request
from clmerge.deploy.predictors import Predictor
from clmerge.evaluation.evaluate import Split, accuracy_on, evaluate
from clmerge.evaluation.evaluator import Rows
from clmerge.evaluation.probes import Occasion, Probe
from clmerge.evaluation.probes.measuring import Probing
from clmerge.merging import Merger, Statistics
from clmerge.models import Classifier
from clmerge.results.results import SETTINGS, Results, Setting
from clmerge.statistics.measure import measure, training_images
from clmerge.streams import AdaptationData, Stream, StreamDataModule
from clmerge.training.module import ContinualClassifier
from clmerge.weights.task_vector import State


class Session:
    """Evaluate, score and measure the models of one stream; ``fit`` and the commands on finished runs share it.

    Args:
        stream: The tasks.
        module: The classifier.
        data: Its data module.
        seed: Seed of the run.
        evaluation: Which reading of the logits is used by searches, scores and tables; default that of the stream.
        statistics_images: Training images per task that statistics are measured on.
        adaptation: Images that mergers and routings learn on; default the validation images, unlabelled.

    Attributes:
        tasks: The tasks of the stream.
    """

    def __init__(
        self,
        stream: Stream,
        module: ContinualClassifier,
        data: StreamDataModule,
        *,
        seed: int = 0,
        evaluation: Setting | None = None,
        statistics_images: int = 256,
        adaptation: AdaptationData | None = None,
    ) -> None:
        self.stream, self.module, self.data = stream, module, data
        self.tasks = stream.tasks  # reads the labels, so that missing data is an error before anything is written
        self.seed = seed
        self.evaluation: Setting = evaluation or stream.evaluation
        self.statistics_images = statistics_images
        self.adaptation = adaptation or AdaptationData()

    @property
    def uploads(self) -> int:
        """Number of models that are sent to be merged, for every task."""
        return 1

    @property
    def task_classes(self) -> list[Sequence[int]]:
        """Global class ids of every task."""
        return [task.classes for task in self.tasks]

    @property
    def has_validation(self) -> bool:
        """Whether every task has validation images."""
        return all(len(self.stream.dataset(task.index, "val")) for task in self.tasks)

    def check_learning(self, mergers: Mapping[str, Merger]) -> None:
        """Refuse mergers that learn, if the adaptation data does not serve them.

        Args:
            mergers: Mergers by name.

        Raises:
            ValueError: If one reads labels that it may not see, or a task has no such images.
        """
        for name, merger in mergers.items():
            if merger.requires_gradient:
                try:
                    self.adaptation.check(self.stream, labels=merger.reads_labels)
                except ValueError as error:
                    raise ValueError(f"merger {name!r}: {error}") from error

    def losses(self, model: nn.Module, request: Request) -> Iterator[Sequence[Loss]]:
        """Yield the losses of every step on the adaptation data, as ``Losses`` describes it."""
        return adaptation_losses(self.adaptation, self.data, seed=self.seed)(model, request)

    def num_images(self, task: int, split: Split) -> int:
        """Return the number of images of a task in a split, or in all of them."""
        if split == "all":
            return sum(len(self.stream.dataset(task, each)) for each in ("train", "val", "test"))
        return len(self.stream.dataset(task, split))

    def new_results(self, name: str, kept: Sequence[int] | None = None) -> Results:
        """Return results without models.

        Args:
            name: Name of the run.
            kept: Indices of the tasks that count; default all.
        """
        tasks = self.tasks if kept is None else [self.tasks[task] for task in kept]
        return Results(
            [task.name for task in tasks],
            classes=[task.class_names for task in tasks],
            samples=[len(self.stream.dataset(task.index, "test")) for task in tasks],
            evaluation=self.evaluation,
            name=name,
            seed=self.seed,
        )

    def evaluate(
        self,
        trainer: Trainer,
        predictors: Mapping[str, Predictor],
        task: int,
        *,
        split: Split = "test",
        on: Sequence[int] | None = None,
        module: Classifier | None = None,
        confusion: bool = False,
        probing: Probing | None = None,
    ) -> Rows:
        """Return the accuracies of several models on all tasks, and what probes found.

        Args:
            trainer: A Trainer without a MergeCallback.
            predictors: Predictors by name.
            task: The latest task that was learned; a head that grows has no accuracy on later ones.
            split: Which images.
            on: Indices of the tasks whose images are used; default all. Accuracies on others are NaN.
            module: Another classifier of the same classes; default the session's own.
            confusion: Whether answers are counted by class, too; for models that know all classes.
            probing: Probes, see :meth:`probing`; the trainer must allow gradients if one needs them.
        """
        rows = evaluate(
            trainer,
            self.module if module is None else module,
            predictors,
            self.data,
            task_classes=self.task_classes,
            num_classes=len(self.stream.class_names),
            split=split,
            tasks=on,
            confusion=confusion,
            probing=probing,
        )
        known = len(self.tasks) if self.module.head.open_vocabulary else task + 1
        unknown = [math.nan] * (len(self.tasks) - known)
        for row in rows.values():
            for setting in SETTINGS:
                row[setting] = row[setting][:known] + unknown
        return rows

    def probing(
        self,
        probes: Sequence[Probe],
        task: int,
        *,
        weights: Mapping[str, Callable[[], State]] | None = None,
        base: State | None = None,
        last: bool | None = None,
    ) -> Probing | None:
        """Return how models are probed after a task; None without probes.

        Args:
            probes: The probes.
            task: The latest task that was learned.
            weights: Returns the merged parameters of a model, dense, by its name.
            base: theta_0 by the same names.
            last: Whether no task follows; default whether it is the last of the stream.
        """
        if not probes:
            return None
        occasion = Occasion(
            task_names=[each.name for each in self.tasks],
            task_classes=self.task_classes,
            num_classes=len(self.stream.class_names),
            num_seen=task + 1,
            reading=self.evaluation,
            seed=self.seed,
            uploads=self.uploads,
            last=task == len(self.tasks) - 1 if last is None else last,
        )
        return Probing(probes, occasion, weights or {}, base or {})

    @torch.no_grad()
    def score(self, tasks: Sequence[int]) -> float:
        """Return the accuracy of the module's current weights on the validation images of some tasks."""
        own = self.task_classes if self.evaluation == "task_aware" else None
        return accuracy_on(self.module, self.data.eval_dataloader("val", tasks), own)

    def images(self, task: int) -> Iterator[Tensor]:
        """Yield the training images of a task that its statistics are measured on, in batches."""
        return training_images(self.module, self.data, task, num_images=self.statistics_images, seed=self.seed)

    def measure(self, needed: Set[str], task: int, *, base: Mapping[str, Tensor], num_steps: int) -> Statistics:
        """Measure statistics of a task on the module's current weights.

        Args:
            needed: Names of statistics.
            task: Index of the task.
            base: theta_0 by parameter name.
            num_steps: Optimizer steps of the task.
        """
        return measure(
            needed,
            self.module,
            self.data,
            task,
            base=base,
            num_steps=num_steps,
            num_images=self.statistics_images,
            seed=self.seed,
        )
