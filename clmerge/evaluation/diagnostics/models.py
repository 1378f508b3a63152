"""Diagnostics of experts and merged models on images: barriers, weight disentanglement, representation bias."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clmerge.evaluation.diagnostics.behaviour import (
    Behaviour,
    Observer,
    barrier,
    disagreement,
    first_images,
    representation_bias,
)
from clmerge.evaluation.diagnostics.json_types import to_json
from clmerge.evaluation.diagnostics.knowledge import Knowledge
from clmerge.evaluation.diagnostics.sharpness import average_sharpness
from clmerge.results.results import BASE, EXPERT, SETTINGS, Setting
from clmerge.weights import State, TaskVector

Batches = list[tuple[Tensor, Tensor]]


class TaskVectors(Protocol):
    """Task vectors by the index of their task: a ``TaskVectorBank``, a list, a dictionary."""

    def __len__(self) -> int: ...

    def __getitem__(self, task: int, /) -> State: ...


def diagnose_models(
    module: nn.Module,
    weights: Callable[[State], State],
    vectors: TaskVectors,
    merged: Mapping[str, State],
    loaders: Sequence[Iterable[Any]],
    *,
    task_classes: Sequence[Sequence[int]],
    setting: Setting = "task_agnostic",
    scale: float = 1.0,
    num_points: int = 5,
    num_images: int = 256,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Compare experts, base and merged models on a bounded number of images of every task.

    Every task's images are decoded once. Memory holds these images, the merged vectors, two task vectors, a
    combination of the two and one set of weights. With ``T`` tasks and ``M`` mergers every task's images are classified
    ``1 + 1 + p + M (1 + p) + (T - 1)(2 + p)`` times, with ``p = num_points - 2``, and ``3 (2 + M)`` times for the
    sharpness.

    Args:
        module: A classifier as for :class:`clmerge.evaluation.diagnostics.Observer`, with a head for all tasks.
        weights: Maps a task vector to the module's weights: ``partial(apply_task_vector, base)`` for dense weights.
        vectors: Task vectors of the tasks ``0`` to ``T - 1``, for example a bank; with the names that ``weights`` uses.
        merged: Merged vector of every merger, scale included.
        loaders: One loader per task, by index; batches begin with images and global labels. Use validation images, or
            test images if no choice depends on the result.
        task_classes: Global class ids of every task.
        setting: Whether all classes compete (``task_agnostic``), or only those of the image's task (``task_aware``).
        scale: Coefficient of the task vectors for which disentanglement is measured.
        num_points: Models along every segment, both ends included; at least 3.
        num_images: Maximum number of images per task, the first ones of its loader.
        progress: Called with a description of the current measurement.

    Returns:
        The ``models`` part of the diagnostics document (docs/diagnostics.md).

    Raises:
        ValueError: If a setting is out of range, or the number of loaders or lists of classes is not that of tasks.
    """
    num_tasks = len(vectors)
    if num_points < 3 or num_images < 1 or setting not in SETTINGS:
        raise ValueError(
            f"expected 3 points or more, 1 image or more and a setting of {SETTINGS}, got num_points={num_points}, "
            f"num_images={num_images}, setting={setting!r}"
        )
    if len(loaders) != num_tasks or len(task_classes) != num_tasks:
        raise ValueError(
            f"expected a loader and classes for each of the {num_tasks} task vectors, got {len(loaders)} loaders and "
            f"classes of {len(task_classes)} tasks"
        )
    observer = Observer(module)
    positions = [index / (num_points - 1) for index in range(num_points)]
    segments = _Segments(positions)
    xi = torch.zeros(num_tasks, num_tasks, dtype=torch.float64)
    knowledge = Knowledge()
    counts: list[int] = []
    references: dict[str, dict[str, list[float]]] = {
        name: {"loss": [], "error": [], "disagreement": [], "representation_bias": [], "sharpness": []}
        for name in (BASE, EXPERT, *merged)
    }
    for task in range(num_tasks):
        progress(f"diagnosing on task {task + 1} of {num_tasks}")
        batches = first_images(loaders[task], num_images)
        counts.append(sum(len(labels) for _, labels in batches))
        classes = task_classes[task] if setting == "task_aware" else None

        def behave(tau: State, batches: Batches = batches, classes: Sequence[int] | None = classes) -> Behaviour:
            return observer(weights(tau), batches, classes)

        own = vectors[task]
        zero = {name: tensor.new_zeros(()).expand(tensor.shape) for name, tensor in own.items()}  # takes no memory
        expert = behave(own)
        ends = {BASE: (zero, behave(zero)), EXPERT: (own, expert)}
        ends |= {name: (tau, behave(tau)) for name, tau in merged.items()}
        for name, (tau, seen) in ends.items():
            rise = average_sharpness(observer, weights(tau), batches, loss=seen.loss, classes=classes)
            references[name]["sharpness"].append(rise)
            references[name]["loss"].append(seen.loss)
            references[name]["error"].append(seen.error)
            references[name]["disagreement"].append(disagreement(seen.predictions, expert.predictions))
            references[name]["representation_bias"].append(representation_bias(seen.features, expert.features))
        segments.add(BASE, EXPERT, [task], behave, ends[BASE], ends[EXPERT])
        for name in merged:
            segments.add(EXPERT, name, [task], behave, ends[EXPERT], ends[name])
        alone = expert if scale == 1.0 else behave(combine((scale, own)))
        others_right = torch.zeros_like(expert.right)
        for other in range(num_tasks):
            if other == task:
                continue
            tau = vectors[other]
            pair = [(own, expert), (tau, behave(tau))]
            others_right |= pair[1][1].right
            first, second = pair if task < other else reversed(pair)
            segments.add(EXPERT, EXPERT, sorted((task, other)), behave, first, second)
            joint = behave(combine((scale, own), (scale, tau)))
            # Half of the pair's error now, half when the other task's images are at hand.
            half = disagreement(joint.predictions, alone.predictions) / 2
            xi[task, other] += half
            xi[other, task] += half
        knowledge.add(expert.right, others_right, {name: ends[name][1].right for name in (BASE, *merged)})
    document: dict[str, Any] = to_json(
        {
            "setting": setting,
            "images": counts,
            "positions": positions,
            "models": references,
            "segments": segments.found(),
            "disentanglement": {"scale": scale, "xi": xi},
            "knowledge": knowledge.found(),
        }
    )
    return document


def combine(*terms: tuple[float, State]) -> TaskVector:
    """Return the weighted sum of task vectors with the same names.

    Example:
        >>> combine((0.5, {"w": torch.tensor([2.0])}), (2.0, {"w": torch.tensor([1.0])}))
        {'w': tensor([3.])}
    """
    (share, first), *others = terms
    total = {name: tensor * share for name, tensor in first.items()}
    for share, vector in others:
        for name, tensor in vector.items():
            total[name] += share * tensor
    return total


class _Segments:
    """Losses and errors along segments between two models, averaged over the tasks of each segment."""

    def __init__(self, positions: Sequence[float]) -> None:
        self.positions = list(positions)
        self._curves: dict[tuple[str, str, tuple[int, ...]], list[list[tuple[float, float]]]] = {}

    def add(
        self,
        start: str,
        end: str,
        tasks: Sequence[int],
        behave: Callable[[State], Behaviour],
        first: tuple[State, Behaviour],
        second: tuple[State, Behaviour],
    ) -> None:
        """Measure one segment on the images of one task."""
        inner = [behave(combine((1.0 - share, first[0]), (share, second[0]))) for share in self.positions[1:-1]]
        curve = [(found.loss, found.error) for found in (first[1], *inner, second[1])]
        self._curves.setdefault((start, end, tuple(tasks)), []).append(curve)

    def found(self) -> list[dict[str, Any]]:
        """Return all segments with their curves and barriers."""
        segments = []
        for (start, end, tasks), curves in self._curves.items():
            loss, error = torch.tensor(curves, dtype=torch.float64).mean(dim=0).T.tolist()
            segments.append(
                {
                    "from": start,
                    "to": end,
                    "tasks": list(tasks),
                    "loss": loss,
                    "error": error,
                    "loss_barrier": barrier(self.positions, loss),
                    "error_barrier": barrier(self.positions, error),
                }
            )
        return segments
