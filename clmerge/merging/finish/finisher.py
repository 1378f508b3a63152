"""Finishers: transformations of the merged vector after the reduction."""

from abc import ABC, abstractmethod

from typing_extensions import override

from clmerge.merging.norms import vector_norm
from clmerge.merging.scope import Scope, Scoped
from clmerge.settings import Configured
from clmerge.weights.task_vector import State, TaskVector


class Finisher(Configured, Scoped, ABC):
    """Transform the merged vector of a reducer.

    Attributes:
        uses_sum: Whether the finisher also needs the sum of the task vectors, which the pipeline then keeps: 4 bytes
            per parameter.
    """

    scope: Scope = "parameter"
    uses_sum: bool = False
    _sees_model = frozenset({"finish"})

    @abstractmethod
    def finish(self, vector: TaskVector) -> TaskVector:
        """Finish a merged vector.

        Args:
            vector: The reducer's result; the finisher may change it in place.

        Returns:
            The vector to add to theta0.
        """

    def finish_beside(self, vector: TaskVector, total: State, num_tasks: int) -> TaskVector:
        """Finish a merged vector given the sum of the task vectors; by default the sum is ignored.

        Args:
            vector: As for ``finish``.
            total: Sum of the task vectors before any sparsifier; empty unless ``uses_sum``.
            num_tasks: Number of task vectors.
        """
        return self.finish(vector)


class Scale(Finisher):
    """Multiply the merged vector by a scaling coefficient, in addition to the reducer's own.

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


class ClipNorm(Finisher):
    """Scale the merged vector down to a maximum L2 norm of the whole vector; shorter vectors are unchanged.

    Args:
        max_norm: The maximum norm, above 0.

    Raises:
        ValueError: If ``max_norm`` is not positive.

    Example:
        >>> import torch
        >>> ClipNorm(1.0).finish({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    """

    name = "clip_norm"

    def __init__(self, max_norm: float) -> None:
        if not max_norm > 0:
            raise ValueError(f"expected a positive max_norm, got {max_norm}")
        self.max_norm = max_norm

    @override
    def finish(self, vector: TaskVector) -> TaskVector:
        norm = vector_norm(vector)
        return Scale(self.max_norm / norm).finish(vector) if norm > self.max_norm else vector
