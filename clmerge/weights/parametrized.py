"""What a module is asked that trains other tensors than its dense weights."""

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
    """A module whose dense weights are not, by themselves, what is trained (LoRA, tangent models, ...).

    The *dense names* are those the weights had before the module was tuned this way, relative to this module. They,
    not the tensors that are trained, are what a task vector is made of: every merger sees dense tensors.
    """

    answers_for_children: ClassVar[bool] = True
    """Whether parametrized modules inside of this one are its own matter: they are not asked themselves then."""

    shardable: ClassVar[bool] = True
    """Whether FSDP2 may shard it: it takes parameters for what ``getattr`` gives under their names."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Return the dense names of the weights that the inner parameters move."""

    @abstractmethod
    def inner(self) -> Sequence[str]:
        """Return names of this module's own parameters that are never merged by themselves: factors, scales."""

    @abstractmethod
    def dense(self) -> dict[str, Tensor]:
        """Return the weights that the module computes with now, by the dense names of ``names``; differentiable."""

    @abstractmethod
    def state(self, base: State, tau: State) -> dict[str, Tensor]:
        """Return values of own parameters with which the module computes ``base + tau`` in its mode.

        Args:
            base: Dense weights by dense names; all of ``names`` or some.
            tau: What is added to them; the same names.

        Returns:
            Value by own name, in the base's dtype; differentiable by ``tau``. Parameters that are not named keep their
            values.
        """

    @abstractmethod
    def renew(self, generator: torch.Generator) -> None:
        """Start a task: keep what is computed, in place, with fresh inner parameters drawn from ``generator``."""

    @abstractmethod
    def folded(self) -> nn.Module:
        """Return an ordinary module with the dense weights under their dense names; it may share the others."""

    def delta(self, base: State) -> TaskVector:
        """Return ``dense - base``, detached, in float32 (float64 if either side is).

        Args:
            base: Dense weights of the base model by dense names; all of ``names`` or some.
        """
        with torch.no_grad():
            dense = self.dense()
        return task_vector({name: full_copy(dense[name]) for name in base}, base)

    def low_rank(self, base: State) -> dict[str, Product]:
        """Return factors of those entries of ``delta`` whose rank is known to be low; none by default."""
        return {}

    def dense_name(self, own: str) -> str:
        """Return the dense name of an own parameter or buffer that is not inner; the same by default."""
        return own
