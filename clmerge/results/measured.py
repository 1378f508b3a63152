"""What a probe found about one model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measured:
    """What a probe found about one model.

    Attributes:
        value: The number that stands in tables and curves; NaN where it is undefined.
        per_task: The number for every task of the stream, NaN where it is undefined; empty if it is not by task.
        values: Further numbers by name.
        n: How many images, bits or members each is counted over: per task, by name (``value`` for the value itself),
            or together.
    """

    value: float
    per_task: Sequence[float] = ()
    values: Mapping[str, float] = field(default_factory=dict)
    n: int | Sequence[int] | Mapping[str, int] = 0

    def to_dict(self) -> dict[str, Any]:
        """Return it in the form of ``results.json``, without what is empty."""
        found: dict[str, Any] = {"value": self.value, "n": self.n}
        if self.per_task:
            found["per_task"] = list(self.per_task)
        if self.values:
            found["values"] = dict(self.values)
        return found

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Measured":
        """Rebuild it from ``results.json`` or a row cache, NaN where that has null."""

        def number(value: float | None) -> float:
            return math.nan if value is None else float(value)

        per_task = [number(value) for value in document.get("per_task", ())]
        values = {name: number(value) for name, value in document.get("values", {}).items()}
        return cls(number(document["value"]), per_task, values, document["n"])
