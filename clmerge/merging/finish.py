"""Finishers: what happens to the merged vector after the reduction."""

from abc import ABC, abstractmethod

from typing_extensions import override

from clmerge.merging.configured import Configured
from clmerge.merging.scope import Scope, Scoped
from clmerge.weights.task_vector import TaskVector


class Finisher(Configured, Scoped, ABC):
    """Change a merged vector after a reducer computed it."""

    scope: Scope = "parameter"
    _sees_model = frozenset({"finish"})

    @abstractmethod
    def finish(self, vector: TaskVector) -> TaskVector:
        """Finish a merged vector.

        Args:
            vector: The reducer's result; it belongs to the finisher, which may write into it.

        Returns:
            What is added to theta0.
        """


class Scale(Finisher):
    """Multiply the merged vector by a scaling coefficient, on top of the reducer's own.

    Args:
        scale: The coefficient.

    Example:
        >>> import torch
        >>> Scale(0.5).finish({"w": torch.tensor([2.0])})
        {'w': tensor([1.])}
    """

    name = "scale"
    scope = "parameter"

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    @override
    def finish(self, vector: TaskVector) -> TaskVector:
        for tensor in vector.values():
            tensor.mul_(self.scale)
        return vector
