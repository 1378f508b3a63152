"""Soft maps of units, which need not leave the function alone: optimal transport between any widths, and CCA."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clmerge.alignment.activations import covariances
from clmerge.alignment.descent import Descent
from clmerge.alignment.matching import covered
from clmerge.alignment.pairs import unit_rows
from clmerge.alignment.reparametrization import Reparametrization, blockwise
from clmerge.alignment.spec import PermutationSpec
from clmerge.weights import State


class LinearMaps:
    """A matrix for what writes a group's units and one for what reads them, then a map of heads.

    Args:
        spec: The groups of the network that is mapped.
        maps: By group: how new units are made of old ones, ``(new, old)``, and old ones of new ones, ``(old, new)``.
        heads: A reparametrization of the result; default none.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        maps: Mapping[str, tuple[Tensor, Tensor]],
        heads: Reparametrization | None = None,
    ) -> None:
        self.spec, self.maps, self.heads = spec, dict(maps), heads

    def apply(self, state: State, *, origin: str = "the state") -> dict[str, Tensor]:
        """Carry weights or a task vector over; the map is linear.

        Args:
            state: Tensors by name.
            origin: Source of the state, for messages.

        Raises:
            ValueError: If a tensor is not covered, or of another size.
        """
        self.spec.check(state, origin=origin)
        moved = {}
        for name, tensor in state.items():
            found = tensor
            for key, axis in self.spec.axes_of(name):
                if key in self.maps:
                    write, read = self.maps[key]
                    found = blockwise(found, axis.axis, (read.T if axis.reads else write)[None], axis.spread)
            moved[name] = found if found is not tensor else tensor.clone()
        return moved if self.heads is None else self.heads.apply(moved)


class OTFusion:
    """Match units softly by optimal transport, between networks of any widths (Singh and Jaggi, arXiv 1910.05653).

    Layer by layer from the input, with the maps of earlier layers applied: the cost of two units is the squared
    distance of their weights, the masses are uniform. For transformers (Imfeld et al., arXiv 2310.05719) heads are
    matched as wholes and need equal numbers and sizes. With equal widths and no regularisation it is a permutation.

    Needs POT: ``pip install 'clmerge[ot]'``.

    Args:
        regularization: Of Sinkhorn's algorithm, as a share of the mean cost; 0 for exact transport.
    """

    def __init__(self, regularization: float = 0.0) -> None:
        if regularization < 0:
            raise ValueError(f"expected a regularization of 0 or more, got {regularization}")
        self.regularization = regularization

    def match(
        self, reference: State, other: State, spec: PermutationSpec, other_spec: PermutationSpec | None = None
    ) -> LinearMaps:
        """Return the map of ``other`` into the units of ``reference``.

        Args:
            reference: Weights of one network.
            other: Weights of the other, by the same names.
            spec: The groups of the reference.
            other_spec: The groups of the other network, by the same names; default ``spec``.

        Raises:
            ImportError: Without POT.
            ValueError: If names differ, or heads differ in number or size.
        """
        theirs = spec if other_spec is None else other_spec
        ours, second = covered(reference, spec, "the reference"), covered(other, theirs, "the other network")
        if spec.groups.keys() != theirs.groups.keys():
            raise ValueError("expected two networks with groups of the same names, got others: other depths?")
        maps: dict[str, tuple[Tensor, Tensor]] = {}
        for key, group in spec.groups.items():
            found = theirs.groups[key]
            if group.heads:
                if (group.heads, group.size) != (found.heads, found.size):
                    raise ValueError(f"expected equal heads at {key!r}, got {group.size} and {found.size} units")
                continue
            moved = LinearMaps(theirs, maps).apply(second)
            left, right = [], []
            for mine, yours in zip(group.axes, found.axes, strict=True):
                a = unit_rows(ours[mine.name], mine, group.size).double()
                b = unit_rows(moved[yours.name], yours, found.size).double()
                if a.shape[1] == b.shape[1]:  # the other side is mapped, or has no units
                    left.append(a)
                    right.append(b)
            plan = self._plan(torch.cdist(torch.cat(left, 1), torch.cat(right, 1)).square())
            maps[key] = plan / plan.sum(1, keepdim=True), (plan / plan.sum(0, keepdim=True)).T
        soft = LinearMaps(theirs, maps)
        heads = [key for key, group in spec.groups.items() if group.heads]
        if not heads:
            return soft
        descent = Descent(ours, soft.apply(second), spec)
        turned = descent.run(max_sweeps=100, generator=torch.Generator().manual_seed(0), only=heads)
        return LinearMaps(theirs, maps, turned)

    def _plan(self, cost: Tensor) -> Tensor:
        try:
            import ot
        except ImportError as error:
            raise ImportError("expected POT for OTFusion, got none: pip install 'clmerge[ot]'") from error
        table = cost.cpu().numpy()
        masses: list[Any] = [torch.full((n,), 1.0 / n, dtype=torch.float64).numpy() for n in cost.shape]
        if not self.regularization:
            return torch.as_tensor(ot.emd(*masses, table))
        strength = self.regularization * max(float(cost.mean()), 1e-12)
        return torch.as_tensor(ot.sinkhorn(*masses, table, strength, method="sinkhorn_log", numItermax=10_000))


class CCAMatching:
    """Match units by canonical correlation analysis of their activations (Horoi et al., arXiv 2407.05385).

    The maps mix units and are no symmetry: what comes out is another function, to be averaged and perhaps tuned. Heads
    stay as they are; running statistics must be estimated again.

    Args:
        regularization: Share of the mean variance that is added to the variances.
    """

    def __init__(self, regularization: float = 0.1) -> None:
        if regularization <= 0:
            raise ValueError(f"expected a regularization above 0, got {regularization}")
        self.regularization = regularization

    def match(
        self, reference: nn.Module, other: nn.Module, spec: PermutationSpec, batches: Iterable[Tensor]
    ) -> LinearMaps:
        """Return the map of ``other`` into the units of ``reference``.

        Args:
            reference: A network.
            other: Another one of its architecture.
            spec: Its groups.
            batches: Images.
        """
        maps = {}
        for key, (xx, yy, xy) in covariances(reference, other, spec, batches).items():
            left, right = _roots(xx, self.regularization), _roots(yy, self.regularization)
            u, _, vh = torch.linalg.svd(left[1] @ xy @ right[1])
            turn = u @ vh
            maps[key] = left[0] @ turn @ right[1], right[0] @ turn.T @ left[1]
        return LinearMaps(spec, maps)


def _roots(covariance: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return the square root of a covariance, regularised, and its inverse."""
    floor = share * float(covariance.diagonal().mean()) + 1e-12
    values, vectors = torch.linalg.eigh(covariance)
    values = (values.clamp(min=0.0) + floor).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
