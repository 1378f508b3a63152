"""Predictors: how a merged model, which may have several sets of weights, scores images."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

State = Mapping[str, Tensor]

Place = Callable[[Callable[[], State]], State]
"""Computes weights while the module has its own, and returns them under the module's names on its device."""


class Compute(Protocol):
    """Runs the module on a batch of images.

    Attributes:
        images: The batch, ``(B, channels, height, width)``, for predictors with a module of their own.
    """

    @property
    def images(self) -> Tensor: ...  # noqa: D102  an attribute

    def __call__(self, state: State) -> Tensor:
        """Return the scores with the given weights, ``(B, C)``; missing tensors are the module's own."""


class Predictor(ABC):
    """Maps the images of a batch to scores of all classes, with one module whose tensors are exchanged.

    Attributes:
        needs_task: Whether it needs the task of every image; it then has a task-aware accuracy only.
        choices: The tasks that it chose among for the last batch, and the share of its choices that each of them got,
            ``(B, len(tasks))``; None if it chooses no task.
    """

    needs_task: bool = False
    choices: tuple[Sequence[int], Tensor] | None = None

    def knows(self, task: int) -> bool:
        """Return whether it can score images of a task."""
        return True

    @abstractmethod
    def prepare(self, place: Place) -> Set[str]:
        """Prepare for a pass over the images.

        Args:
            place: Computes weights and moves them to the module's device.

        Returns:
            The module's names of the exchanged tensors.
        """

    @abstractmethod
    def scores(self, compute: Compute, tasks: Tensor) -> Tensor:
        """Score a batch.

        Args:
            compute: Runs the module on the batch.
            tasks: Index of the task of every image, ``(B,)``; only predictors with ``needs_task`` may use it.

        Returns:
            Scores ``(B, C)``, float32; higher means more likely.
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
    """One set of weights per task, chosen by the given task of each image.

    Args:
        view: Returns the weights of a task by the module's names. Called when images of the task begin; the result is
            kept until images of another task follow.
        tasks: Indices of the known tasks, at least one.

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

    def view(self, task: int) -> State:
        """Return the weights of a task by the module's names."""
        return self._view(task)

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
        # Run the whole batch for each of its tasks, nearly always one: sharing between predictors needs equal inputs.
        found = compute(self._of(known[0]))
        for task in known[1:]:
            found = torch.where((tasks == task).unsqueeze(1), compute(self._of(task)), found)
        return found


class Ensemble(Predictor):
    """Mean probability of several members, added one at a time (arXiv 1612.01474).

    Every pass over the images must be over the same batches in the same order, in one process: each runs the newest
    member alone, and adds its probabilities to the sums that earlier passes left.

    Example:
        >>> ensemble, tasks = Ensemble(), torch.tensor([0])
        >>> for weight in (0.0, 1.0):
        ...     ensemble.add({"w": torch.tensor([[weight, 0.0]])})
        ...     _ = ensemble.prepare(lambda make: make())
        ...     scores = ensemble.scores(lambda state: state["w"], tasks)
        >>> scores / 2
        tensor([[0.6155, 0.3845]])
    """

    def __init__(self) -> None:
        self._newest: State = {}
        self._placed: State = {}
        self._sums: list[Tensor] = []
        self._position = 0

    def add(self, state: State) -> None:
        """Add a member; the next pass over the images runs it.

        Args:
            state: Weights by the module's names.
        """
        self._newest = state

    @override
    def prepare(self, place: Place) -> Set[str]:
        self._placed = place(lambda: self._newest)
        self._position = 0
        return set(self._placed)

    @override
    def scores(self, compute: Compute, tasks: Tensor) -> Tensor:
        """Score a batch by the sum of the members' probabilities, which ranks classes as their mean does."""
        found = compute(self._placed).softmax(dim=1).cpu()
        if self._position < len(self._sums):
            found = self._sums[self._position] + found
            self._sums[self._position] = found
        else:
            self._sums.append(found)
        self._position += 1
        return found.to(tasks.device)


class LogitMean(Predictor):
    """Mean of the logits of several members, all run on every batch: the ensemble of averages (EoA, arXiv 2110.10832).

    In that paper every member is the simple moving average of a training of its own. An image costs as many passes as
    there are members, whose weights are all kept.

    Args:
        states: Weights of every member by the module's names.

    Raises:
        ValueError: If there is no member.

    Example:
        >>> ensemble = LogitMean([{"w": torch.tensor([[1.0]])}, {"w": torch.tensor([[4.0]])}])
        >>> ensemble.prepare(lambda make: make())
        {'w'}
        >>> ensemble.scores(lambda state: state["w"], torch.tensor([0]))
        tensor([[2.5000]])
    """

    def __init__(self, states: Sequence[State]) -> None:
        if not states:
            raise ValueError("expected one member of the ensemble or more, got none")
        self._states = list(states)
        self._placed: list[State] = []

    @override
    def prepare(self, place: Place) -> Set[str]:
        self._placed = [place(partial(dict, state)) for state in self._states]
        return {name for state in self._placed for name in state}

    @override
    def scores(self, compute: Compute, tasks: Tensor) -> Tensor:
        total = compute(self._placed[0])
        for state in self._placed[1:]:
            total = total + compute(state)
        return total / len(self._placed)
