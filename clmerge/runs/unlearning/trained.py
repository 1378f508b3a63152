"""Methods that train on what is to be forgotten, and how fast it is learned again."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from clmerge.evaluation.evaluate import accuracy_on
from clmerge.runs.stored_run import StoredRun
from clmerge.streams.splits import derived_seed
from clmerge.training.unlearning import Batches, ascent_loss, memorising_loss, steps_on
from clmerge.weights.parametrization import read_task_vector
from clmerge.weights.swap import swapped
from clmerge.weights.task_vector import State, TaskVector

RELEARN_STEPS = 50
WITHIN = 0.01


def ascended(run: StoredRun, start: State, tasks: Sequence[int], steps: int) -> list[TaskVector]:
    """Return the vectors after every step of gradient ascent on the training images of tasks.

    Args:
        run: The run.
        start: Weights of the start, by the module's names.
        tasks: The tasks to forget.
        steps: Number of steps, with the run's batch size, optimizer and its learning rate.
    """
    run.enter(len(run.tasks) - 1)  # on its device, too
    batches, _ = _batches(run, tasks, "gradient_ascent")
    with swapped(run.module, start):
        loss = ascent_loss(_competing(run, tasks))
        return [_vector(run) for _ in steps_on(run.module, batches, loss, steps)]


def memorised(run: StoredRun, start: State, task: int, steps: int | None, *, random_labels: float = 0.5) -> TaskVector:
    """Return the vector after a model has learned a task once more, in the form of SSU (arXiv 2406.10952).

    The loss is the cross-entropy plus a multiple of that of random other labels, and the gradients of every step are
    masked by their salience.

    Args:
        run: The run.
        start: Weights of the start, by the module's names.
        task: The task to forget.
        steps: Number of steps; None: one epoch.
        random_labels: Factor of the loss of random labels.
    """
    run.enter(len(run.tasks) - 1)
    batches, per_epoch = _batches(run, [task], "ssu")
    generator = torch.Generator().manual_seed(derived_seed(run.seed, "ssu labels", task))
    loss = memorising_loss(_competing(run, [task]), random_labels=random_labels, generator=generator)
    with swapped(run.module, start):
        for _ in steps_on(run.module, batches, loss, steps or per_epoch, salient=True):
            pass
        return _vector(run)


def relearning_steps(run: StoredRun, start: State, tasks: Sequence[int], images: int) -> int | None:
    """Return the steps after which a model knows tasks again as well as their experts, to within a point.

    Every step is on the same images of all of the tasks; the accuracy is that on the test images. None if 50 steps do
    not do.

    Args:
        run: The run.
        start: Weights of the start, by the module's names.
        tasks: The tasks.
        images: Training images per task.
    """
    run.enter(len(run.tasks) - 1)
    wanted = _accuracy(run, tasks, [run.expert(task) for task in tasks]) - WITHIN
    if _accuracy(run, tasks, [start]) >= wanted:
        return 0
    parts = [_some(run, task, images) for task in tasks]
    batch: tuple[Tensor, Tensor] = tuple(torch.cat(each) for each in zip(*parts, strict=True))  # type: ignore[assignment]
    loss = memorising_loss(_competing(run, tasks), generator=torch.Generator())
    with swapped(run.module, start):
        for step in steps_on(run.module, lambda: iter([batch]), loss, RELEARN_STEPS):
            if _accuracy(run, tasks, [{}]) >= wanted:
                return step
    return None


def _accuracy(run: StoredRun, tasks: Sequence[int], states: Sequence[State]) -> float:
    """Return the mean accuracy on tasks, of one model each or of one for all."""
    classes = run.task_classes if run.evaluation == "task_aware" else None
    found = []
    for place, task in enumerate(tasks):
        with swapped(run.module, states[min(place, len(states) - 1)]):
            found.append(accuracy_on(run.module, run.data.eval_dataloader("test", [task]), classes))
    return math.fsum(found) / len(found)


def _some(run: StoredRun, task: int, images: int) -> tuple[Tensor, Tensor]:
    whole = run.stream.dataset(task, "train", run.data.eval_transform)
    generator = torch.Generator().manual_seed(derived_seed(run.seed, "relearn", task))
    chosen = torch.randperm(len(whole), generator=generator)[:images].tolist()
    pictures, labels = zip(*(whole[place] for place in chosen), strict=True)
    return torch.stack(pictures), torch.tensor(labels)


def _batches(run: StoredRun, tasks: Sequence[int], what: str) -> tuple[Batches, int]:
    """Return the batches of one epoch over the training images of tasks, and their number."""
    images: ConcatDataset[Any] = ConcatDataset(
        [run.stream.dataset(task, "train", run.data.eval_transform) for task in tasks]
    )
    generator = torch.Generator().manual_seed(derived_seed(run.seed, what, *tasks))
    loader = DataLoader(images, batch_size=run.data.batch_size, shuffle=True, generator=generator)

    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
        yield from loader

    return epoch, len(loader)


def _competing(run: StoredRun, tasks: Sequence[int]) -> list[int] | None:
    """Return the classes that compete in the loss; None: all that the head knows."""
    if run.evaluation == "task_agnostic":
        return None
    return sorted({class_id for task in tasks for class_id in run.task_classes[task]})


def _vector(run: StoredRun) -> TaskVector:
    return read_task_vector(run.module, run.base, device=torch.device("cpu"))
