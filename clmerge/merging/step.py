"""What comes beside a task vector."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from clmerge.weights.task_vector import State, TaskVector

Score = Callable[[TaskVector], float]
"""Held-out accuracy of theta0 + vector; higher is better."""

Statistics = Mapping[str, State | float]
"""What was measured on a task beside its vector, by name: tensors by parameter name, or one number."""


PIECE = "piece"
"""The identity of what is not a whole task vector."""


@dataclass(frozen=True)
class Step:
    """What one update knows beside the task vector.

    Attributes:
        task: Index of the task; it seeds random rules.
        position: How many task vectors were merged before this one.
        score: The held-out metric, for rules that require it.
        statistics: What else was measured on the task, for rules that require it.
        sign: 1 to fold the vector in, -1 to take it out again.
        largest: Largest magnitude of every parameter, where somebody has looked.
        identity: What the accumulator will know the task by, the vector and its statistics; see ``identity.py``.
    """

    task: int
    position: int
    score: Score | None = None
    statistics: Statistics = field(default_factory=dict)
    sign: int = 1
    largest: Mapping[str, float] = field(default_factory=dict)
    identity: str = ""

    @property
    def is_piece(self) -> bool:
        """Whether this is a part of a task vector, brought piece by piece."""
        return self.identity == PIECE
