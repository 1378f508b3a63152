"""Probes: what a model does beyond its accuracies, measured after every task and stored beside them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.models import Classifier
from clmerge.results.contract import Setting
from clmerge.results.measured import Measured
from clmerge.settings import Configured
from clmerge.streams import Stream
from clmerge.streams.plan import SplitPlan
from clmerge.weights.task_vector import State

NO_TASK = -1
"""The task of images that belong to no task of the stream: all classes compete."""

TEST = "test"
"""The part that the evaluation goes through anyway: the test images of the stream."""


@dataclass(frozen=True)
class Occasion:
    """When and how a model is looked at.

    Attributes:
        task_names: Names of all tasks of the stream.
        task_classes: Global class ids of every task.
        num_classes: Number of classes.
        num_seen: Number of tasks that were learned.
        reading: Whether all classes compete, or those of an image's task only.
        seed: Seed of the run.
        last: Whether no task follows.
        uploads: Number of models that were sent to be merged, for every task.
    """

    task_names: Sequence[str]
    task_classes: Sequence[Sequence[int]]
    num_classes: int
    num_seen: int
    reading: Setting = "task_agnostic"
    seed: int = 0
    last: bool = True
    uploads: int = 1

    @property
    def num_tasks(self) -> int:
        """Number of tasks of the stream."""
        return len(self.task_classes)

    def mean_over_seen(self, per_task: Sequence[float]) -> float:
        """Return the mean over the tasks learned so far of what is defined; NaN if nothing is."""
        known = [value for value in per_task[: self.num_seen] if not math.isnan(value)]
        return sum(known) / len(known) if known else math.nan


@dataclass(frozen=True)
class View:
    """A model and a batch of images.

    Attributes:
        part: Name of the part of the probe's images; ``test`` for the test images of the stream.
        images: ``(B, channels, height, width)``, under the evaluation transform.
        labels: Global class ids ``(B,)``.
        tasks: Task of every image ``(B,)``; -1 for images of no task.
        scores: Logits ``(B, C)``, float32; -inf for classes that do not compete.
        score: Returns the logits of other images in the place of these, of the same tasks. Differentiable in the images
            if the probe needs gradients.
        normalise: Mean and standard deviation of the images' channels, ``(channels, 1, 1)`` each: images are pixels in
            [0, 1], less the mean, divided by the deviation.
    """

    part: str
    images: Tensor
    labels: Tensor
    tasks: Tensor
    scores: Tensor
    score: Callable[[Tensor], Tensor]
    normalise: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Seen:
    """What was seen of the images of one part.

    Attributes:
        rows: What :meth:`ImageProbe.look` returned, ``(N, k)``, float64, in the order of the images.
        tasks: Task of every image, ``(N,)``.
    """

    rows: Tensor
    tasks: Tensor

    def per_task(self, values: Tensor, num_tasks: int) -> tuple[list[float], list[int]]:
        """Return the mean of a value over every task's images, NaN for none, and how many images there are.

        Args:
            values: ``(N,)``.
            num_tasks: Number of tasks.
        """
        means, counts = [], []
        for task in range(num_tasks):
            own = values[self.tasks == task]
            counts.append(len(own))
            means.append(float(own.double().mean()) if len(own) else math.nan)
        return means, counts


class Probe(Configured, ABC):
    """A number about a model, such as the success rate of an attack, beside its accuracy matrix.

    Probes never train or change the model. Subclasses keep every constructor argument under its own name. They are
    measured of every merged, calibrated, routed and un-merged model.

    Attributes:
        name: Its name in results, tables and loggers.
        after: Whether it is measured after ``every`` evaluated task or after the ``last`` one only.
        better: Whether ``higher`` or ``lower`` is better; None if neither is.
        is_share: Whether its numbers are shares of ``n`` cases, shown in percent.
        sources: arXiv ids of the papers.
    """

    name: str = ""
    after: Literal["every", "last"] = "every"
    better: ClassVar[Literal["higher", "lower"] | None] = None
    is_share: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...]] = ()

    def check(self, stream: Stream) -> None:
        """Refuse a stream that it cannot be measured on, before anything is trained.

        Args:
            stream: The stream.

        Raises:
            ValueError: If it cannot.
        """

    def described(self) -> dict[str, Any]:
        """Return what readers of its results need to know."""
        return {"better": self.better, "share": self.is_share, "probe": repr(self)}


class ImageProbe(Probe):
    """A probe that looks at a model's answers, image by image.

    Attributes:
        needs_gradient: Whether it differentiates through the model.
    """

    needs_gradient: ClassVar[bool] = False

    def meet(self, module: Classifier) -> None:
        """Read what a classifier keeps beside the weights of the models; called before images are looked at.

        Args:
            module: The classifier that runs the models; must not be changed.

        Raises:
            ValueError: If it lacks what the probe needs.
        """

    def parts(self, stream: Stream) -> Mapping[str, Mapping[int, SplitPlan]]:
        """Return the images to look at: by the name of a part, and by task (-1 for those of no task).

        Default: the test images of the stream, which are evaluated anyway; any other part costs a pass of its own.

        Args:
            stream: The stream.
        """
        return {TEST: {}}

    @abstractmethod
    def look(self, view: View) -> Tensor:
        """Return k numbers about each image of a batch, ``(B, k)``.

        Args:
            view: The model and the batch.
        """

    @abstractmethod
    def summary(self, seen: Mapping[str, Seen], occasion: Occasion) -> Measured:
        """Return the finding from what was seen of all images.

        Args:
            seen: The rows by part.
            occasion: Tasks and classes.
        """


class WeightProbe(Probe):
    """A probe that looks at a model's weights alone; models without one set of weights are left out."""

    @abstractmethod
    def measure(self, weights: State, base: State, occasion: Occasion) -> Measured:
        """Return the finding.

        Args:
            weights: The model's merged parameters, dense, by name.
            base: theta_0 by the same names.
            occasion: Tasks and classes.
        """


class AccuracyProbe(ImageProbe):
    """Base of probes that count an image as a hit or not; per task, and as the mean over the tasks learned so far."""

    is_share = True

    @abstractmethod
    def hits(self, view: View) -> Tensor:
        """Return whether each image is a hit: ``(B,)``, 1 or 0, NaN for images that do not count."""

    @override
    def look(self, view: View) -> Tensor:
        return self.hits(view).double().unsqueeze(1)

    @override
    def summary(self, seen: Mapping[str, Seen], occasion: Occasion) -> Measured:
        rows, tasks = (torch.cat([getattr(one, key) for one in seen.values()]) for key in ("rows", "tasks"))
        counted = ~torch.isnan(rows[:, 0])
        found = Seen(rows[counted], tasks[counted])
        per_task, n = found.per_task(found.rows[:, 0], occasion.num_tasks)
        return Measured(occasion.mean_over_seen(per_task), per_task, n=n)


def check_probes(probes: Sequence[Probe], stream: Stream) -> None:
    """Refuse probes of one name, or that a stream does not serve.

    Args:
        probes: The probes.
        stream: The stream.

    Raises:
        ValueError: If two have one name, or one cannot be measured.
    """
    names = [probe.name for probe in probes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"expected probes of different names, got {twice[0]!r} twice: their settings are told apart "
            "by the run that they are in, not by name"
        )
    for probe in probes:
        probe.check(stream)
