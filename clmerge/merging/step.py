"""The arguments of an update other than the task vector."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from clmerge.merging.objectives import Objective
from clmerge.weights.task_vector import State, TaskVector

Score = Callable[[TaskVector], float]
"""Held-out accuracy of theta0 + vector; higher is better."""

Statistics = Mapping[str, State | float]
"""Statistics of a task by name: each is a mapping of parameter names to tensors, or one number."""


Gradient = Callable[[TaskVector], tuple[float, TaskVector]]
"""The loss of theta0 + vector on the next images, and its gradient by parameter; a parameter may be missing.

The vector is taken over: it may be empty afterwards, so that it takes no memory beside the weights.
"""


class Gradients(Protocol):
    """Gradients of an objective on adaptation images, for rules that learn."""

    def __call__(
        self, objective: Objective, tasks: Sequence[int], *, seed: int, expert: Callable[[int], State]
    ) -> Gradient:
        """Return the gradient, which goes on to the next images with every call.

        Args:
            objective: What is minimised: the sum over the tasks of its mean over a batch of each.
            tasks: Tasks whose images are used, the latest last.
            seed: Seed of the order of the images.
            expert: Returns the vector of one of the tasks, for objectives that need its outputs.
        """


PIECE = "piece"
"""The identity of a piece of a task vector."""


@dataclass(frozen=True)
class Step:
    """The arguments of one update other than the task vector.

    Attributes:
        task: Index of the task; it seeds random rules.
        position: Number of task vectors merged before this one.
        score: The held-out metric, for rules that require it.
        gradients: Gradients on adaptation images, for rules that require them.
        statistics: Statistics of the task, for rules that require them.
        sign: 1 to fold the vector in, -1 to remove it.
        largest: Largest magnitude of each parameter, if computed already.
        identity: Identity of the vector and its statistics, stored by the accumulator; see ``identity.py``.
    """

    task: int
    position: int
    score: Score | None = None
    gradients: Gradients | None = None
    statistics: Statistics = field(default_factory=dict)
    sign: int = 1
    largest: Mapping[str, float] = field(default_factory=dict)
    identity: str = ""

    @property
    def is_piece(self) -> bool:
        """Whether this update folds in a piece of a task vector."""
        return self.identity == PIECE
