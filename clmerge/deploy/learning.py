"""Gradients of losses by merged weights, for rules that learn: the weights are put into the model itself."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from clmerge.merging import Gradient, Objective
from clmerge.weights import State, apply_task_vector
from clmerge.weights.modes import eval_mode
from clmerge.weights.parametrization import folded
from clmerge.weights.swap import named_tensors
from clmerge.weights.task_vector import TaskVector

Loss = Callable[[nn.Module], Tensor]
"""Returns the loss of the model's current weights on one batch, a scalar."""


@dataclass(frozen=True)
class Request:
    """What a rule learns.

    Attributes:
        objective: What it minimises.
        tasks: Tasks whose images are used, the latest last.
        seed: Seed of the order of the images.
        expert: Puts the weights of a task's expert into the model for a block.
    """

    objective: Objective
    tasks: Sequence[int]
    seed: int
    expert: Callable[[int], AbstractContextManager[None]]


class Losses(Protocol):
    """Losses on adaptation images, by which rules learn."""

    def __call__(self, model: nn.Module, request: Request) -> Iterator[Sequence[Loss]]:
        """Yield, without end, the losses of every step; they are added, and differentiated one at a time.

        Args:
            model: The model, in evaluation mode, with dense weights in ordinary layers.
            request: What is learned.
        """


@contextmanager
def learning(
    model: nn.Module, base: State, losses: Losses, *, buffers: State, origin: str
) -> "Iterator[_ModelGradients]":
    """Open a model for learning; it is as it was afterwards, also after an exception.

    Args:
        model: The model, tuned in any mode.
        base: theta_0 by dense names.
        losses: The losses on adaptation images.
        buffers: Running statistics of the merged models by dense name, where they are not the model's own.
        origin: Source of the base, for messages.

    Yields:
        The ``gradients`` of an update.

    Raises:
        ValueError: If the model's weights are sharded.
    """
    with folded(model) as dense, eval_mode(dense):
        own = named_tensors(dense, [*base, *buffers], origin=origin)
        if sharded := [name for name, tensor in own.items() if isinstance(tensor, DTensor)]:
            raise ValueError(
                f"expected whole weights to learn coefficients with, got {sharded[0]!r} in shards: a rule that learns "
                "needs a strategy that keeps the model whole on every device (ddp), or `clmerge compare` afterwards"
            )
        wanted = {parameter: parameter.requires_grad for parameter in dense.parameters()}
        try:
            for parameter in wanted:
                parameter.requires_grad_(False)
            yield _ModelGradients(dense, base, losses, own, buffers)
        finally:
            for parameter, requires in wanted.items():
                parameter.requires_grad_(requires)


class _ModelGradients:
    """Build the gradients of one update."""

    def __init__(self, model: nn.Module, base: State, losses: Losses, own: State, buffers: State) -> None:
        self.model, self.base, self.losses = model, base, losses
        self.own, self.buffers = own, buffers

    def __call__(
        self, objective: Objective, tasks: Sequence[int], *, seed: int, expert: Callable[[int], State]
    ) -> Gradient:
        request = Request(objective, list(tasks), seed, lambda task: self._holding(expert(task)))
        steps = self.losses(self.model, request)

        def gradient(vector: TaskVector) -> tuple[float, TaskVector]:
            devices = {name: tensor.device for name, tensor in vector.items()}
            weights = {name: self.own[name] for name in devices}
            with self._holding(vector, take=True):
                total = 0.0
                try:
                    for weight in weights.values():
                        weight.requires_grad_()
                    for loss in next(steps):
                        with torch.enable_grad():
                            value = loss(self.model)
                            torch.autograd.backward(value)  # adds to what the losses before have left
                        total += float(value.detach())
                    slopes = {n: weight.grad.to(devices[n]) for n, weight in weights.items() if weight.grad is not None}
                finally:
                    for weight in weights.values():
                        weight.grad = None
                        weight.requires_grad_(False)
            return total, slopes

        return gradient

    @contextmanager
    def _holding(self, vector: State, *, take: bool = False) -> Iterator[None]:
        """Put theta_0 plus a vector into the model, without copying what the model has; ``take`` empties the vector."""
        before: dict[str, Tensor] = {}

        def put(name: str, value: Tensor) -> None:
            own = self.own[name]
            before[name] = own.data
            own.data = value.to(own.device, own.dtype)

        try:
            for name in list(vector):
                tau = vector.pop(name) if take and isinstance(vector, dict) else vector[name]
                put(name, apply_task_vector({name: self.base[name]}, {name: tau})[name])
            for name, value in self.buffers.items():
                put(name, value)
            yield
        finally:
            for name, data in before.items():
                self.own[name].data = data
