"""Which units of a network may change places: groups of units, and the axes of parameters along which they lie."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from clmerge.weights import State


@dataclass(frozen=True)
class Axis:
    """An axis of a parameter along which the units of a group lie.

    Attributes:
        name: Name of the parameter.
        axis: The axis, from 0.
        part: Which of ``parts`` equal chunks of the axis holds the units.
        parts: Number of chunks; 3 where query, key and value share one matrix.
        spread: Entries per unit, for a linear layer that reads flattened feature maps.
        reads: Whether the axis reads the units (columns of the next layer) or undoes them (keys, which meet queries in
            a product). A matrix that changes the units' basis acts here by the transpose of its inverse.
    """

    name: str
    axis: int
    part: int = 0
    parts: int = 1
    spread: int = 1
    reads: bool = False


@dataclass(frozen=True)
class Group:
    """Units that change places together.

    Attributes:
        size: Number of units.
        axes: Where they lie.
        heads: Number of attention heads that the units form, in order; 0 for units without heads.
        order: Groups of heads with the same ``order`` share one order of heads.
        rigid: Whether units stay where they are within their head.
    """

    size: int
    axes: tuple[Axis, ...]
    heads: int = 0
    order: str = ""
    rigid: bool = False

    @property
    def head_size(self) -> int:
        """Units per head."""
        return self.size // self.heads if self.heads else self.size


@dataclass(frozen=True)
class PermutationSpec:
    """The symmetries of an architecture: groups of units whose order does not matter.

    Attributes:
        groups: Groups by name.
        fixed: Names of parameters and buffers without such units.
        outputs: Group that the network's outputs lie along, if its readers are no part of the network.

    Raises:
        ValueError: If an axis is claimed twice, or a group of heads cannot be divided.

    Example:
        >>> hidden = Group(8, (Axis("0.weight", 0), Axis("0.bias", 0), Axis("2.weight", 1, reads=True)))
        >>> spec = PermutationSpec({"hidden": hidden}, fixed=("2.bias",))
        >>> spec.names == {"0.weight", "0.bias", "2.weight", "2.bias"}
        True
    """

    groups: Mapping[str, Group]
    fixed: Sequence[str] = ()
    outputs: str = ""
    _found: dict[str, list[tuple[str, Axis]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found: dict[str, list[tuple[str, Axis]]] = {}
        for key, group in self.groups.items():
            if group.heads and group.size % group.heads:
                raise ValueError(f"expected {key!r} of a multiple of {group.heads} heads, got {group.size} units")
            for axis in group.axes:
                others = found.setdefault(axis.name, [])
                for other, taken in others:
                    same = (axis.axis, axis.part, axis.parts) == (taken.axis, taken.part, taken.parts)
                    if same or (other == key and axis.axis != taken.axis):
                        raise ValueError(
                            f"expected one group for every axis of {axis.name!r}, got {other!r} and {key!r}"
                            if same
                            else f"expected {key!r} on one axis of {axis.name!r}, got it on two"
                        )
                others.append((key, axis))
        if both := [name for name in self.fixed if name in found]:
            raise ValueError(f"expected fixed parameters without units, got {both[0]!r}, which has some")
        object.__setattr__(self, "_found", found)

    @property
    def names(self) -> set[str]:
        """Names of all parameters and buffers that are covered."""
        return {*self._found, *self.fixed}

    @property
    def moved_names(self) -> list[str]:
        """Names of the parameters and buffers that have units."""
        return list(self._found)

    def axes_of(self, name: str) -> list[tuple[str, Axis]]:
        """Return the groups along a parameter's axes."""
        return self._found.get(name, [])

    def orders(self) -> dict[str, list[str]]:
        """Return the groups of heads that share an order of heads, by the name of that order."""
        found: dict[str, list[str]] = {}
        for key, group in self.groups.items():
            if group.heads:
                found.setdefault(group.order or key, []).append(key)
        return found

    def check(self, state: State, *, origin: str = "the state", whole: bool = False) -> None:
        """Refuse tensors that no group covers, or of another size.

        Args:
            state: Weights, a task vector, or whatever else lies along the parameters.
            origin: Source of the state, for the message.
            whole: Whether every parameter with units must be there.

        Raises:
            ValueError: If a tensor is not covered, is missing, or does not have the group's size.
        """
        for name, tensor in state.items():
            if name not in self._found and name not in self.fixed:
                raise ValueError(
                    f"expected parameters that the specification covers, got {name!r} in {origin}: no group of units "
                    "lies along it, and it is not among the fixed ones; a map without it would change the function. "
                    "Write a PermutationSpec that names it"
                )
            self._check_shape(name, tensor, origin)
        if whole and (missing := [name for name in self._found if name not in state]):
            raise ValueError(f"expected all parameters with units in {origin}, got none named {missing[0]!r}")

    def _check_shape(self, name: str, tensor: Tensor, origin: str) -> None:
        for key, axis in self.axes_of(name):
            expected = self.groups[key].size * axis.parts * axis.spread
            if axis.axis >= tensor.ndim or tensor.shape[axis.axis] != expected:
                raise ValueError(
                    f"expected {expected} entries along axis {axis.axis} of {name!r} ({key}), got "
                    f"{tuple(tensor.shape)} in {origin}: another architecture?"
                )

    def prefixed(self, prefix: str) -> "PermutationSpec":
        """Return the specification of a module that has this one's at ``prefix`` (with its dot)."""
        groups = {
            key: replace(group, axes=tuple(replace(axis, name=prefix + axis.name) for axis in group.axes))
            for key, group in self.groups.items()
        }
        return PermutationSpec(groups, tuple(prefix + name for name in self.fixed), self.outputs)

    def without(self, groups: Iterable[str]) -> "PermutationSpec":
        """Return the specification with some groups pinned: their units stay where they are."""
        pinned = set(groups)
        if unknown := pinned - self.groups.keys():
            raise ValueError(f"expected groups of {sorted(self.groups)}, got {sorted(unknown)[0]!r}")
        kept = {key: group for key, group in self.groups.items() if key not in pinned}
        covered = {axis.name for group in kept.values() for axis in group.axes}
        fixed = tuple(name for name in (*self._found, *self.fixed) if name not in covered)
        return PermutationSpec(kept, fixed, "" if self.outputs in pinned else self.outputs)

    def extended(self, readers: Mapping[str, Sequence[Axis]]) -> "PermutationSpec":
        """Return the specification with more axes of its groups, such as those of a classifier on the features.

        Args:
            readers: More axes by group.
        """
        groups = {key: replace(group, axes=(*group.axes, *readers.get(key, ()))) for key, group in self.groups.items()}
        added = {axis.name for axes in readers.values() for axis in axes}
        return PermutationSpec(groups, tuple(name for name in self.fixed if name not in added), self.outputs)
