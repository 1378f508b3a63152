"""A change of a network's units that leaves its function as it is: permutations, and bases within attention heads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clmerge.alignment.spec import Axis, Group, PermutationSpec
from clmerge.weights import State

_ORTHOGONAL = 1e-9


@dataclass(frozen=True)
class UnitMap:
    """What happens to the units of one group: new unit ``i`` is old unit ``index[i]``, then a basis change per head.

    Attributes:
        index: Permutation of the units, int64 of shape ``(n,)``.
        within: Invertible matrices of shape ``(heads, d, d)`` in float64, or None. With them ``index`` moves whole
            heads only.
    """

    index: Tensor
    within: Tensor | None = None

    @property
    def is_permutation(self) -> bool:
        """Whether units only change places."""
        return self.within is None

    def inverse(self) -> "UnitMap":
        """Return the map that undoes this one."""
        back = torch.argsort(self.index)
        if self.within is None:
            return UnitMap(back)
        heads = back[:: self.within.shape[1]] // self.within.shape[1]
        return UnitMap(back, _inverse(self.within)[heads])

    def after(self, first: "UnitMap") -> "UnitMap":
        """Return the map that does ``first`` and then this one."""
        if self.within is None and first.within is None:
            return UnitMap(first.index[self.index])
        count = len(first.within if self.within is None else self.within)  # type: ignore[arg-type]
        (own, turn), (other, first_turn) = self._by_heads(count), first._by_heads(count)
        size = turn.shape[1]
        return UnitMap(other[own], turn @ first_turn[own[::size] // size])

    def _by_heads(self, heads: int) -> tuple[Tensor, Tensor]:
        """Return index and matrices of the same map, with the moves within heads as matrices."""
        if self.within is not None:
            return self.index, self.within
        size = len(self.index) // heads
        blocks = self.index.view(heads, size)
        source = blocks[:, 0] // size
        matrices = torch.zeros(heads, size, size, dtype=torch.float64)
        matrices.scatter_(2, (blocks - source[:, None] * size)[:, :, None], 1.0)
        return (source[:, None] * size + torch.arange(size)).reshape(-1), matrices


class Reparametrization:
    """One map per group of units, by which weights, task vectors and Fisher information are carried over.

    Args:
        spec: The groups.
        maps: Maps by group; groups without one stay as they are.

    Raises:
        ValueError: If a map is no permutation of its group's units, or tears attention heads apart.

    Example:
        >>> from clmerge.alignment import Axis, Group, PermutationSpec
        >>> spec = PermutationSpec({"hidden": Group(2, (Axis("w", 0),))})
        >>> swap = Reparametrization(spec, {"hidden": UnitMap(torch.tensor([1, 0]))})
        >>> swap.apply({"w": torch.tensor([[1.0], [2.0]])})["w"].tolist()
        [[2.0], [1.0]]
    """

    def __init__(self, spec: PermutationSpec, maps: Mapping[str, UnitMap]) -> None:
        self.spec = spec
        self.maps = {key: maps[key] for key in spec.groups if key in maps}
        if unknown := [key for key in maps if key not in spec.groups]:
            raise ValueError(f"expected groups of {list(spec.groups)}, got {unknown[0]!r}")
        orders: dict[str, tuple[str, list[int]]] = {}
        for key, found in self.maps.items():
            _check(key, found, spec.groups[key])
        for order, keys in spec.orders().items():
            for key in keys:
                own = self._head_order(key)
                first, expected = orders.setdefault(order, (key, own))
                if own != expected:
                    raise ValueError(
                        f"expected one order of heads for {first!r} and {key!r}, got two: another function"
                    )

    def _head_order(self, key: str) -> list[int]:
        group = self.spec.groups[key]
        index = self._index(key)[:: group.head_size]
        return [int(unit) // group.head_size for unit in index]

    def _index(self, key: str) -> Tensor:
        found = self.maps.get(key)
        return torch.arange(self.spec.groups[key].size) if found is None else found.index

    @property
    def is_permutation(self) -> bool:
        """Whether units only change places, so that the maps are exact in any dtype."""
        return all(found.is_permutation for found in self.maps.values())

    def moved(self) -> dict[str, float]:
        """Return, by group, the share of units that do not stay where they are."""
        shares = {}
        for key, group in self.spec.groups.items():
            found = self.maps.get(key)
            stay = self._index(key) == torch.arange(group.size)
            if found is not None and found.within is not None:
                same = (found.within - torch.eye(group.head_size, dtype=torch.float64)).abs().amax(2) < _ORTHOGONAL
                stay &= same.reshape(-1)
            shares[key] = 1.0 - float(stay.double().mean())
        return shares

    def apply(self, state: State, *, origin: str = "the state") -> dict[str, Tensor]:
        """Carry weights or a task vector over; the map is linear.

        Args:
            state: Tensors by name; names that the specification covers, not necessarily all of them.
            origin: Source of the state, for messages.

        Returns:
            New tensors in the same dtypes; permutations keep every bit.

        Raises:
            ValueError: If a tensor is not covered, or of another size.
        """
        self.spec.check(state, origin=origin)
        return {name: self.applied(name, tensor) for name, tensor in state.items()}

    def applied(self, name: str, tensor: Tensor) -> Tensor:
        """Carry one parameter over.

        Args:
            name: Its name, which the specification covers.
            tensor: Its value; not changed.
        """
        moved = tensor
        for key, axis in self.spec.axes_of(name):
            if (found := self.maps.get(key)) is not None:
                moved = _along(moved, axis, found)
        return moved.clone() if moved is tensor else moved

    def apply_squared(self, state: State, *, origin: str = "the Fisher information") -> dict[str, Tensor]:
        """Carry a diagonal Fisher information, or other squares of entries, over.

        Raises:
            ValueError: If units do not only change places: a diagonal has no exact image in another basis.
        """
        if not self.is_permutation:
            mixed = next(key for key, found in self.maps.items() if not found.is_permutation)
            raise ValueError(
                f"expected a permutation to carry {origin} over, got a change of basis within the heads of {mixed!r}: "
                "measure it again, or match with within_head='permutation'"
            )
        return self.apply(state, origin=origin)

    def inverse(self) -> "Reparametrization":
        """Return the map that undoes this one."""
        return Reparametrization(self.spec, {key: found.inverse() for key, found in self.maps.items()})

    def compose(self, first: "Reparametrization") -> "Reparametrization":
        """Return the map that does ``first`` and then this one.

        Raises:
            ValueError: If the two are of different specifications.
        """
        if self.spec.groups != first.spec.groups:
            raise ValueError("expected two maps of one specification, got two specifications")
        maps = dict(first.maps)
        for key, found in self.maps.items():
            maps[key] = found.after(first.maps[key]) if key in first.maps else found
        return Reparametrization(self.spec, maps)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the maps as tensors: ``GROUP.index`` in int64, and ``GROUP.within`` in float64."""
        state = {}
        for key, found in self.maps.items():
            state[f"{key}.index"] = found.index
            if found.within is not None:
                state[f"{key}.within"] = found.within
        return state

    @classmethod
    def from_state_dict(cls, spec: PermutationSpec, state: Mapping[str, Any]) -> "Reparametrization":
        """Return the map of a state.

        Args:
            spec: The groups.
            state: As ``state_dict`` returned it.

        Raises:
            ValueError: If the state has other groups or sizes.
        """
        keys = [name.removesuffix(".index") for name in state if name.endswith(".index")]
        return cls(spec, {key: UnitMap(state[f"{key}.index"], state.get(f"{key}.within")) for key in keys})


def identity(spec: PermutationSpec) -> Reparametrization:
    """Return the map that leaves all units where they are."""
    return Reparametrization(spec, {})


def random_reparametrization(
    spec: PermutationSpec, generator: torch.Generator, *, within_head: str = "permutation"
) -> Reparametrization:
    """Draw a random symmetry, to test a specification with.

    Args:
        spec: The groups.
        generator: Source of randomness.
        within_head: ``none``, ``permutation``, ``orthogonal`` or ``invertible`` maps within attention heads.
    """
    maps: dict[str, UnitMap] = {}
    orders: dict[str, Tensor] = {}
    for keys in spec.orders().values():
        orders |= dict.fromkeys(keys, torch.randperm(spec.groups[keys[0]].heads, generator=generator))
    for key, group in spec.groups.items():
        if not group.heads:
            maps[key] = UnitMap(torch.randperm(group.size, generator=generator))
            continue
        size, heads = group.head_size, orders[key]
        free = "none" if group.rigid else within_head
        inner = torch.arange(size).expand(group.heads, size)
        if free == "permutation":
            inner = torch.stack([torch.randperm(size, generator=generator) for _ in range(group.heads)])
        index = (heads[:, None] * size + inner).reshape(-1)
        within = None
        if free in ("orthogonal", "invertible"):
            drawn = torch.randn(group.heads, size, size, generator=generator, dtype=torch.float64)
            within = torch.linalg.qr(drawn)[0]
            if free == "invertible":
                scales = 0.5 + torch.rand(group.heads, size, 1, generator=generator, dtype=torch.float64)
                within = within * scales @ torch.linalg.qr(drawn.mT)[0]
        maps[key] = UnitMap(index, within)
    return Reparametrization(spec, maps)


def _along(tensor: Tensor, axis: Axis, found: UnitMap) -> Tensor:
    """Return a tensor with the units along one axis mapped."""
    size = tensor.shape[axis.axis] // axis.parts
    index = found.index.to(tensor.device)
    if axis.spread > 1:
        index = (index[:, None] * axis.spread + torch.arange(axis.spread, device=tensor.device)).reshape(-1)
    if axis.parts > 1:
        whole = torch.arange(tensor.shape[axis.axis], device=tensor.device)
        whole[axis.part * size : (axis.part + 1) * size] = index + axis.part * size
        moved = tensor.index_select(axis.axis, whole)
    else:
        moved = tensor.index_select(axis.axis, index)
    if found.within is None:
        return moved
    matrices = _inverse(found.within).mT if axis.reads else found.within
    part = moved.narrow(axis.axis, axis.part * size, size)
    part.copy_(blockwise(part, axis.axis, matrices.to(tensor.device), axis.spread))
    return moved


def blockwise(tensor: Tensor, axis: int, matrices: Tensor, spread: int = 1) -> Tensor:
    """Multiply consecutive blocks along an axis by one matrix each, in float64.

    Args:
        tensor: The tensor.
        axis: The axis.
        matrices: Shape ``(blocks, d', d)``; the axis has ``blocks * d * spread`` entries.
        spread: Entries per unit.

    Returns:
        A new tensor with ``blocks * d' * spread`` entries along the axis, in the tensor's dtype.
    """
    heads, new, old = matrices.shape
    front = tensor.movedim(axis, 0)
    flat = front.reshape(heads, old, -1).double()
    rest = front.shape[1:]
    return (matrices.double() @ flat).reshape(heads * new * spread, *rest).movedim(0, axis).to(tensor.dtype)


def _inverse(matrices: Tensor) -> Tensor:
    """Return the inverses of a batch of matrices: the transposes, where these are orthogonal."""
    identity = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
    if float((matrices @ matrices.mT - identity).abs().max()) < _ORTHOGONAL:
        return matrices.mT
    inverse: Tensor = torch.linalg.inv(matrices)
    return inverse


def _check(key: str, found: UnitMap, group: Group) -> None:
    index = found.index
    if index.dtype != torch.int64 or index.shape != (group.size,):
        raise ValueError(
            f"expected int64 indices of {group.size} units for {key!r}, got {index.dtype} {tuple(index.shape)}"
        )
    if not torch.equal(index.sort().values, torch.arange(group.size)):
        raise ValueError(f"expected a permutation of {group.size} units for {key!r}, got a unit twice")
    if group.heads:
        blocks = index.view(group.heads, group.head_size)
        if not torch.equal(blocks // group.head_size, (blocks[:, :1] // group.head_size).expand_as(blocks)):
            raise ValueError(f"expected whole heads for {key!r}, got units of several heads in one: another function")
        whole = torch.equal(blocks - blocks[:, :1], torch.arange(group.head_size).expand_as(blocks))
        if (group.rigid or found.within is not None) and not whole:
            raise ValueError(f"expected units of {key!r} to keep their place within their head, got others")
    if found.within is not None:
        expected = (group.heads, group.head_size, group.head_size)
        if not group.heads or group.rigid or found.within.shape != expected:
            raise ValueError(
                f"expected {'no matrices' if not group.heads or group.rigid else f'matrices {expected}'} for {key!r}, "
                f"got {tuple(found.within.shape)}: under norms and non-linearities units may only change places"
            )
