"""Predictors: what answers an image. A merged model is not always one set of weights."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set

import torch
from torch import Tensor
from typing_extensions import override

State = Mapping[str, Tensor]
Compute = Callable[[State], Tensor]
"""Returns the scores of all images of a batch under some weights, ``(B, C)``; for tensors left out the module's own."""
Place = Callable[[Callable[[], State]], State]
"""Makes weights while the module has its own, and returns them under the module's names on its device."""


class Predictor(ABC):
    """How the images of a batch become scores of all classes, on one module whose tensors are exchanged.

    Attributes:
        needs_task: Whether it must be told the task of every image. It has a task-aware accuracy alone, then.
    """

    needs_task: bool = False

    def knows(self, task: int) -> bool:
        """Return whether it can answer images of a task."""
        return True

    @abstractmethod
    def prepare(self, place: Place) -> Set[str]:
        """Get ready for a pass over the images.

        Args:
            place: Makes weights and moves them to where the module is.

        Returns:
            The module's names of the tensors that are exchanged.
        """

    @abstractmethod
    def scores(self, compute: Compute, tasks: Tensor) -> Tensor:
        """Answer a batch.

        Args:
            compute: Runs the module on the batch.
            tasks: Index of the task of every image, ``(B,)``; only a predictor that needs it may look.

        Returns:
            Scores ``(B, C)``, float32; of two classes the one of the higher score is likelier.
        """


class Merged(Predictor):
    """One set of weights for all images.

    Args:
        state: Weights by the module's names; default the module's own.

    Example:
        >>> merged = Merged({"w": torch.ones(1)})
        >>> merged.prepare(lambda make: make())
        {'w'}
        >>> merged.scores(lambda state: state["w"] * 2, torch.tensor([0]))
        tensor([2.])
    """

    def __init__(self, state: State | None = None) -> None:
        self.state: State = state or {}
        self._placed: State = {}

    @override
    def prepare(self, place: Place) -> Set[str]:
        self._placed = place(lambda: self.state)
        return set(self._placed)

    @override
    def scores(self, compute: Compute, tasks: Tensor) -> Tensor:
        return compute(self._placed)


class PerTask(Predictor):
    """A set of weights for every task, chosen by the task that an image is said to belong to.

    Args:
        view: Returns the weights of a task by the module's names. It is asked when images of the task come up, and its
            answer is kept while they do.
        tasks: Indices of the tasks it knows, one at least.

    Example:
        >>> views = PerTask(lambda task: {"w": torch.full((2, 1), float(task))}, [0, 1])
        >>> views.prepare(lambda make: make())
        {'w'}
        >>> views.scores(lambda state: state["w"], torch.tensor([1, 0])).flatten()
        tensor([1., 0.])
    """

    needs_task = True

    def __init__(self, view: Callable[[int], State], tasks: Sequence[int]) -> None:
        self._view = view
        self.tasks = tuple(tasks)
        self._place: Place = lambda make: make()
        self._placed: dict[int, State] = {}

    @override
    def knows(self, task: int) -> bool:
        return task in self.tasks

    @override
    def prepare(self, place: Place) -> Set[str]:
        self._place = place
        self._placed = {}
        return set(self._of(self.tasks[0]))

    def _of(self, task: int) -> State:
        if task not in self._placed:
            self._placed[task] = self._place(lambda: self._view(task))
        return self._placed[task]

    @override
    def scores(self, compute: Compute, tasks: Tensor) -> Tensor:
        present = sorted(set(tasks.tolist()))
        known = [task for task in present if self.knows(task)] or [self.tasks[0]]
        self._placed = {task: state for task, state in self._placed.items() if task in known}
        # The whole batch for every task in it, nearly always one: what predictors share needs the same input.
        found = compute(self._of(known[0]))
        for task in known[1:]:
            found = torch.where((tasks == task).unsqueeze(1), compute(self._of(task)), found)
        return found
