"""The interface of modules that train other tensors in place of their dense weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from clmerge.weights.factored import Product
from clmerge.weights.swap import full_copy
from clmerge.weights.task_vector import State, TaskVector, task_vector


class Parametrized(nn.Module, ABC):
    """A module that trains inner parameters in place of its dense weights (LoRA, tangent models, ...).

    The *dense names* are the names of the weights before the module was parametrized, relative to this module. Task
    vectors consist of dense weights, not of the trained tensors, so every merger gets dense tensors.
    """

    answers_for_children: ClassVar[bool] = True
    """Whether this module also reports the dense weights of parametrized modules inside it."""

    shardable: ClassVar[bool] = True
    """Whether FSDP2 may shard the module; it requires that ``getattr`` returns the parameter of a name."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Return the dense names of the weights that the inner parameters change."""

    @abstractmethod
    def inner(self) -> Sequence[str]:
        """Return the names of this module's inner parameters (factors, scales), which are not merged themselves."""

    @abstractmethod
    def dense(self) -> dict[str, Tensor]:
        """Return the current dense weights of ``names``; differentiable."""

    @abstractmethod
    def state(self, base: State, tau: State) -> dict[str, Tensor]:
        """Return values of own parameters with which the module computes ``base + tau`` in its mode of tuning.

        Args:
            base: Dense weights by dense names; all of ``names`` or some.
            tau: The vector to add to them; the same names.

        Returns:
            Values by own name, in the base's dtype; differentiable by ``tau``. Other parameters keep their values.
        """

    @abstractmethod
    def renew(self, generator: torch.Generator) -> None:
        """Start a task: draw new inner parameters from ``generator``, in place, without changing the output."""

    @abstractmethod
    def folded(self) -> nn.Module:
        """Return an ordinary module with the dense weights under their dense names; other tensors may be shared."""

    def delta(self, base: State) -> TaskVector:
        """Return ``dense - base``, detached, in float32 (float64 if either side is).

        Args:
            base: Dense weights of the base model by dense names; all of ``names`` or some.
        """
        with torch.no_grad():
            dense = self.dense()
        return task_vector({name: full_copy(dense[name]) for name in base}, base)

    def low_rank(self, base: State) -> dict[str, Product]:
        """Return factors of the matrices of ``delta`` that are known to have low rank; none by default."""
        return {}

    def dense_name(self, own: str) -> str:
        """Return the dense name of a parameter or buffer that is not inner; by default its own name."""
        return own
