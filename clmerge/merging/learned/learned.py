"""Base of the rules that learn coefficients on adaptation images, one parameter of the model at a time."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.checks import Shapes, checked_steps
from clmerge.merging.objectives import Objective
from clmerge.merging.step import Step
from clmerge.merging.stored import Stored
from clmerge.weights.task_vector import State, TaskVector

Taus = Callable[[str], list[Tensor]]
"""Returns a parameter of all task vectors, in order of arrival."""


@dataclass(frozen=True)
class Moment:
    """When a parameter is combined.

    Attributes:
        step: Number of the training step; None for the merged model itself.
        task: Index of the task that is merged, for random numbers; -1 for the merged model.
        survey: What ``_survey`` returned.
    """

    step: int | None = None
    task: int = -1
    survey: Any = None


class Learned(Stored):
    """Learn what combines the task vectors, by gradient descent on an objective after every task.

    A rule defines the coefficients that it starts from (``_start``) and how they combine the task vectors of one
    parameter (``_combine``), differentiably. Memory does not grow with the number of tasks: the gradient of the loss by
    the merged weights is computed once per step, as in ordinary training, and then carried on to the coefficients one
    parameter at a time, whose task vectors are read from where they lie. This is the same derivative, not an estimate.

    The optimizer begins anew with every task. With ``warm_starts`` the coefficients go on from those of the tasks
    before. The vectors must be combined as they were learned, so no finisher may follow.

    Args:
        objective: What is minimised, summed over the tasks so far.
        steps: Optimizer steps after every task; every step takes a batch of each task.
        lr: Learning rate.
        seed: Seed of the order of the images, and of random rules.

    Attributes:
        optimizer: ``"adam"``, ``"adamw"`` or ``"sgd"`` (with momentum 0.9).
        weight_decay: Weight decay of the coefficients.
        warm_starts: Whether coefficients of earlier tasks are kept as the start.
        latest_only: Whether the latest task vector alone is merged, on images of its task.

    Raises:
        ValueError: If a number is out of range.
    """

    removable = False
    order_free = False
    requires_gradient = True
    optimizer: ClassVar[Literal["adam", "adamw", "sgd"]] = "adam"
    weight_decay: float = 0.0
    warm_starts: bool = True
    latest_only: bool = False

    def __init__(self, *, objective: Objective, steps: int, lr: float, seed: int = 0) -> None:
        super().__init__()
        self.steps = checked_steps(steps, 0)
        if not lr > 0:
            raise ValueError(f"expected a learning rate above 0, got {lr}")
        self.lr = lr
        self.seed = seed
        self._objective = objective
        self.reads_labels = objective.needs_labels
        self._coefficients: dict[str, Tensor] = {}
        self._losses: dict[str, float] = {}
        self._keep("_coefficients")
        self._keep("_losses")

    # What a rule defines

    @abstractmethod
    def _start(self, name: str, shape: tuple[int, ...], num_tasks: int) -> dict[str, Tensor]:
        """Return the coefficients that a parameter depends on, as they start; equal names are one coefficient.

        Args:
            name: Name of the parameter.
            shape: Its shape.
            num_tasks: Number of task vectors.
        """

    @abstractmethod
    def _combine(self, name: str, taus: list[Tensor], coefficients: Mapping[str, Tensor], moment: Moment) -> Tensor:
        """Return the merged parameter, differentiable by the coefficients.

        Args:
            name: Name of the parameter.
            taus: Its task vectors, in order of arrival; not to be changed.
            coefficients: All coefficients by name.
            moment: When.
        """

    def _survey(self, names: list[str], taus: Taus) -> Any:
        """Return what combining any parameter needs to know of the whole task vectors; by default nothing."""
        return None

    def _warmed(self, before: Tensor, start: Tensor) -> Tensor:
        """Return a coefficient's start after another task, given its value after the tasks before.

        By default it is kept, and rows of new tasks, along the first dimension, are those of ``start``.
        """
        if before.shape == start.shape:
            return before.clone()
        if before.ndim and before.shape[1:] == start.shape[1:] and len(before) < len(start):
            return torch.cat([before, start[len(before) :]])
        return start

    def _project(self, coefficients: Mapping[str, Tensor]) -> None:
        """Move the coefficients, in place, to where they are allowed; after every step."""

    def _penalty(self, coefficients: Mapping[str, Tensor]) -> Tensor | None:
        """Return what is added to the loss for the coefficients alone."""
        return None

    # What every rule has

    @property
    def coefficients(self) -> dict[str, Tensor]:
        """The learned coefficients by name; copies."""
        return {name: tensor.clone() for name, tensor in self._coefficients.items()}

    @property
    def losses(self) -> dict[str, float]:
        """The loss at the ``first`` and at the ``last`` step of the latest task; empty if there were none."""
        return dict(self._losses)

    @override
    def state_size(self, shapes: Shapes, num_tasks: int) -> int:
        """Return the bytes of the kept vectors in memory and of the coefficients."""
        learned = self._started(shapes, 1 if self.latest_only else num_tasks)
        return super().state_size(shapes, num_tasks) + sum(tensor.nbytes for tensor in learned.values())

    @override
    def _plan(self, vector: State, step: Step) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Learn with the vectors so far and a new one; the state is not changed."""
        shapes = {name: tuple(vector[name].shape) for name in vector}
        taus, tasks = self._pending(vector, step), [*self.tasks, step.task]
        if self.latest_only:
            tasks = tasks[-1:]
        coefficients = self._started(shapes, len(tasks))
        if self.warm_starts:
            before = {name: tensor for name, tensor in self._coefficients.items() if name in coefficients}
            coefficients |= {name: self._warmed(tensor, coefficients[name]) for name, tensor in before.items()}
        if not self.steps or not coefficients:
            return coefficients, {}
        assert step.gradients is not None
        position = {task: index for index, task in enumerate(tasks)}
        gradient = step.gradients(
            self._objective,
            tasks,
            seed=self.seed,
            expert=lambda task: {name: taus(name)[position[task]] for name in shapes},
        )
        for tensor in coefficients.values():
            tensor.requires_grad_()
        optimizer = self._optimizer(list(coefficients.values()))
        survey = self._survey(sorted(shapes), taus)
        losses: dict[str, float] = {}
        for number in range(self.steps):
            moment = Moment(number, step.task, survey)
            merged = {name: self._combine(name, taus(name), coefficients, moment) for name in shapes}
            loss, slopes = gradient(merged)
            if not math.isfinite(loss):
                raise ValueError(
                    f"expected a finite loss while {self!r} learns, got {loss} at step {number + 1} after task "
                    f"{step.task}; lower lr"
                )
            losses = {"first": losses.get("first", loss), "last": loss}
            optimizer.zero_grad()
            self._carry_on(slopes, taus, coefficients, moment)
            optimizer.step()
            self._project({name: tensor.detach() for name, tensor in coefficients.items()})
        return {name: tensor.detach() for name, tensor in coefficients.items()}, losses

    def _carry_on(self, slopes: TaskVector, taus: Taus, coefficients: Mapping[str, Tensor], moment: Moment) -> None:
        """Add the derivatives by the coefficients to their ``grad``, given those by the merged parameters."""
        with torch.enable_grad():
            for name in sorted(slopes):  # whatever order a bank has them in: coefficients may be shared
                merged = self._combine(name, taus(name), coefficients, moment)
                slope = slopes.pop(name).to(merged)
                if merged.requires_grad:
                    torch.autograd.backward(merged, slope)
            if (penalty := self._penalty(coefficients)) is not None:
                torch.autograd.backward(penalty)

    def _optimizer(self, coefficients: list[Tensor]) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(coefficients, self.lr, momentum=0.9, weight_decay=self.weight_decay)
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        return kind(coefficients, self.lr, weight_decay=self.weight_decay)

    def _started(self, shapes: Shapes, num_tasks: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            for key, tensor in self._start(name, shape, num_tasks).items():
                found.setdefault(key, tensor if self._device is None else tensor.to(self._device))
        return found

    def _pending(self, vector: State, step: Step) -> Taus:
        """Return a function that reads a parameter of the merged vectors and of the new one."""
        new = self._sparsified(vector, step.task)

        def taus(name: str) -> list[Tensor]:
            first = not self._kept and vector[name].dtype == torch.float64
            dtype = torch.float64 if first or name in self._wide else torch.float32
            latest = new[name].detach()
            latest = latest.to(self._device or latest.device, dtype).contiguous()
            latest = latest.clone() if latest.is_inference() else latest  # such a tensor cannot be differentiated
            return [*([] if self.latest_only else (self._tau(i, name) for i in range(self.num_tasks))), latest]

        return taus

    @override
    def _after_update(self, step: Step, plan: tuple[dict[str, Tensor], dict[str, float]]) -> None:
        self._coefficients, self._losses = plan

    @override
    def _overview(self) -> Moment:
        return Moment(survey=self._survey(sorted(self._shapes), lambda name: self._taus_of(self._held()[name])))

    @override
    def _read(self, name: str, slots: Slots, overview: Moment) -> Tensor:
        return self._combine(name, self._taus_of(slots), self._coefficients, overview)

    def _taus_of(self, slots: Slots) -> list[Tensor]:
        taus = self._taus(slots)
        return taus[-1:] if self.latest_only else taus


def weighted(taus: list[Tensor], weights: Tensor) -> Tensor:
    """Return the sum of the task vectors of one parameter, each times its weight.

    Args:
        taus: The task vectors.
        weights: One for each, ``(T,)``, or of a shape ``(T, ...)`` that broadcasts with theirs.

    Example:
        >>> weighted([torch.ones(2), torch.tensor([0.0, 2.0])], torch.tensor([1.0, 0.5]))
        tensor([1., 2.])
    """
    if weights.ndim == 1:
        merged: Tensor = _Weighted.apply(weights, *taus)
        return merged
    factors = weights.to(taus[0])
    total = taus[0] * factors[0]
    for tau, factor in zip(taus[1:], factors[1:], strict=True):
        total = total + tau * factor
    return total


class _Weighted(torch.autograd.Function):
    """A sum with one number per task vector, in place; its derivatives are inner products."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *taus: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *taus)
        total = torch.zeros_like(taus[0])
        for tau, weight in zip(taus, weights.tolist(), strict=True):
            total.add_(tau, alpha=weight)
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        weights, *taus = ctx.saved_tensors
        # Not torch.dot, whose bits depend on where in memory the vectors lie, in a bank's file or not.
        found = torch.stack([(slope * tau).sum() for tau in taus])
        own = (
            slope * weight if needed else None
            for weight, needed in zip(weights.tolist(), ctx.needs_input_grad[1:], strict=True)
        )
        return found.to(weights), *own
