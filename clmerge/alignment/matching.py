"""Aligners: from two networks of one architecture to the map that makes the second most like the first."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from clmerge.alignment.descent import Descent
from clmerge.alignment.gauge import balanced
from clmerge.alignment.pairs import unit_rows
from clmerge.alignment.reparametrization import Reparametrization
from clmerge.alignment.spec import PermutationSpec
from clmerge.weights import State

_STREAM = re.compile(r"residual|pool\.out")
Correlations = Mapping[str, Tensor]
"""By group: similarity of units, reference x other, measured on images (``clmerge.alignment.correlations``)."""


class Aligner(ABC):
    """Find the map of one network's units to another's; a matcher of your own is a subclass.

    Also the door for learned matchers (Deep-Align, arXiv 2310.13397): ``match`` may ask a network for its answer, as
    long as it returns a ``Reparametrization``, which is checked.

    Attributes:
        needs_correlations: Whether ``match`` needs correlations of activations.
    """

    needs_correlations: bool = False

    @abstractmethod
    def match(
        self, reference: State, other: State, spec: PermutationSpec, *, correlations: Correlations | None = None
    ) -> Reparametrization:
        """Return the map that carries ``other`` into the units of ``reference``.

        Args:
            reference: Weights by name; at least those with units.
            other: Weights of the other network by the same names.
            spec: The groups of units of their architecture.
            correlations: Similarity of units by their activations.

        Raises:
            ValueError: If a parameter is missing or of another size.
        """

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in vars(self).items() if not key.startswith("_"))
        return f"{type(self).__name__}({settings})"


class WeightMatching(Aligner):
    """Match units by their weights, without data (Git Re-Basin; Ainsworth et al., arXiv 2209.04836).

    Group by group the assignment with the largest inner product of all weights is found, given the other groups' maps,
    until no group gains. Heads of attention are matched as wholes: queries, keys, values and outputs share one order.
    The sum of inner products never falls. Cost of a sweep: ``n^2 m`` for ``n`` units with ``m`` weights, and an
    assignment of ``n``; memory: two networks, one matrix ``n x n`` and one parameter.

    Args:
        within_head: Maps within attention heads: ``none``, a ``permutation``, ``orthogonal`` maps, or ``invertible``
            ones, which contain all that leave the function alone.
        residual: Whether the residual stream of a transformer is matched, too.
        max_sweeps: Most passes over the groups.
        seed: Seed of the order of groups.

    Example:
        >>> from torch import nn
        >>> from clmerge.alignment import spec_of
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = WeightMatching().match(net.state_dict(), net.state_dict(), spec_of(net))
        >>> found.moved()
        {'hidden.0': 0.0}
    """

    def __init__(
        self,
        within_head: Literal["none", "permutation", "orthogonal", "invertible"] = "permutation",
        *,
        residual: bool = True,
        max_sweeps: int = 100,
        seed: int = 0,
    ) -> None:
        if max_sweeps < 1:
            raise ValueError(f"expected max_sweeps of 1 or more, got {max_sweeps}")
        self.within_head = within_head
        self.residual = residual
        self.max_sweeps = max_sweeps
        self.seed = seed

    def match(
        self, reference: State, other: State, spec: PermutationSpec, *, correlations: Correlations | None = None
    ) -> Reparametrization:
        """Return the map that carries ``other`` into the units of ``reference``; correlations are not used."""
        reference, other = covered(reference, spec, "the reference"), covered(other, spec, "the other network")
        if self.within_head != "invertible":
            return self._descend(reference, other, spec, self.within_head)
        ours, theirs = balanced(reference, spec), balanced(other, spec)
        turned = self._descend(ours.apply(reference), theirs.apply(other), spec, "orthogonal")
        return ours.inverse().compose(turned).compose(theirs)

    def _descend(
        self,
        reference: State,
        other: State,
        spec: PermutationSpec,
        within: Literal["none", "permutation", "orthogonal"],
    ) -> Reparametrization:
        only = [key for key in spec.groups if self.residual or not _STREAM.fullmatch(key)]
        generator = torch.Generator().manual_seed(self.seed)
        descent = Descent(reference, other, spec, within_head=within)
        return descent.run(max_sweeps=self.max_sweeps, generator=generator, only=only)


class ActivationMatching(Aligner):
    """Match units by how alike they fire on the same images, and by their weights if asked.

    With ``weights=0`` one assignment per group of the correlations of activations (Li et al., arXiv 1511.07543;
    NeuronAlignment, Tatro et al., arXiv 2009.02439). With more, the mean of both similarities is matched by coordinate
    descent (MuDSC; Xu et al., arXiv 2403.01753), except that the heads of queries, keys, values and outputs move
    together, as the function demands.

    Args:
        weights: Share of the cosine of weights, in [0, 1).
        within_head: Maps within attention heads: ``none`` or a ``permutation``.
        max_sweeps: Most passes over the groups.
        seed: Seed of the order of groups.
    """

    needs_correlations = True

    def __init__(
        self,
        weights: float = 0.0,
        *,
        within_head: Literal["none", "permutation"] = "permutation",
        max_sweeps: int = 100,
        seed: int = 0,
    ) -> None:
        if not 0.0 <= weights < 1.0:
            raise ValueError(f"expected a share of weights in [0, 1), got {weights}; for weights alone WeightMatching")
        self.weights = weights
        self.within_head: Literal["none", "permutation"] = within_head
        self.max_sweeps = max_sweeps
        self.seed = seed

    def match(
        self, reference: State, other: State, spec: PermutationSpec, *, correlations: Correlations | None = None
    ) -> Reparametrization:
        """Return the map that carries ``other`` into the units of ``reference``.

        Raises:
            ValueError: If the correlations of a group are missing, or a parameter is.
        """
        found = require_correlations(correlations, spec)
        reference, other = covered(reference, spec, "the reference"), covered(other, spec, "the other network")
        norms = {key: (_norms(reference, spec, key), _norms(other, spec, key)) for key in spec.groups}

        def scores(key: str, products: Tensor) -> Tensor:
            ours, theirs = norms[key]
            activations = found[key].to(products.dtype)
            return (
                self.weights * products / (ours[:, None] * theirs).to(products.dtype)
                + (1.0 - self.weights) * activations
            )

        descent = Descent(reference, other, spec, within_head=self.within_head, scores=scores)
        generator = torch.Generator().manual_seed(self.seed)
        return descent.run(max_sweeps=self.max_sweeps if self.weights else 1, generator=generator)


def require_correlations(correlations: Correlations | None, spec: PermutationSpec) -> Correlations:
    """Return the correlations of every group, or say how to measure them.

    Raises:
        ValueError: If some are missing.
    """
    missing = [key for key in spec.groups if correlations is None or key not in correlations]
    if correlations is None or missing:
        raise ValueError(
            f"expected correlations of activations for {missing[0] if missing else 'every group'!r}, got none: measure "
            "them with clmerge.alignment.correlations on images, or match with WeightMatching, which needs none"
        )
    return correlations


def _norms(state: State, spec: PermutationSpec, key: str) -> Tensor:
    """Return the norm of every unit's weights; those of dead units are 1."""
    group = spec.groups[key]
    squares = sum(unit_rows(state[axis.name], axis, group.size).double().square().sum(1) for axis in group.axes)
    assert isinstance(squares, Tensor)
    return torch.where(squares > 0, squares, 1.0).sqrt()


def covered(state: State, spec: PermutationSpec, origin: str) -> dict[str, Tensor]:
    """Return the parameters with units, after a check that all of them are there."""
    found = {name: state[name].detach() for name in spec.moved_names if name in state}
    spec.check(found, origin=origin, whole=True)
    return found
