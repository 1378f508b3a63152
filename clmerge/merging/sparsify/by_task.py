"""A separate sparsifier for every task."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from clmerge.merging.checks import of_task
from clmerge.merging.scope import Scope, widest
from clmerge.merging.sparsify.sparsifier import Sparsifier
from clmerge.weights.task_vector import State


class ByTask(Sparsifier):
    """Sparsify every task vector by its own sparsifier, for example trims of different densities.

    Args:
        parts: The sparsifier of every task, by task index.

    Example:
        >>> import torch
        >>> from clmerge.merging import TrimTensor
        >>> trim = ByTask([TrimTensor(0.5), TrimTensor(1.0)])
        >>> [trim({"w": torch.tensor([1.0, -2.0])}, task)["w"].tolist() for task in (0, 1)]
        [[0.0, -2.0], [1.0, -2.0]]
    """

    name = "by_task"
    per_task = ("parts",)
    scope: Scope = "parameter"

    def __init__(self, parts: list[Sparsifier]) -> None:
        self.parts = list(parts)
        self.scope = widest(*self.parts)

    @override
    def plan(self, vector: State, task: int) -> Any:
        return of_task("parts", self.parts, task).plan(vector, task)

    @override
    def sparsify(self, name: str, tau: Tensor, task: int, plan: Any) -> Tensor:
        return of_task("parts", self.parts, task).sparsify(name, tau, task, plan)
