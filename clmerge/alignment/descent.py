"""Coordinate descent over groups of units: every group's best map, given those of the others, by linear assignment."""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Literal

import torch
from torch import Tensor

from clmerge.alignment.pairs import assignment, unit_rows
from clmerge.alignment.reparametrization import Reparametrization, UnitMap
from clmerge.alignment.spec import Group, PermutationSpec
from clmerge.weights import State

WithinHead = Literal["none", "permutation", "orthogonal"]

_RELATIVE = 1e-7  # gains below this share of the sum of absolute scores are rounding
_PATIENCE = 5


class Descent:
    """Match the units of ``other`` to those of ``reference``, group by group, until no group gains.

    Args:
        reference: Weights that stay as they are.
        other: Weights whose units are moved.
        spec: The groups.
        within_head: Maps within attention heads.
        scores: Changes a group's scores, which are inner products of weights: ``(group, scores) -> scores``.
        start: Maps to start from.

    Attributes:
        maps: The maps so far.
        history: Sum of the scores of all groups after every sweep. With scores of weights alone it never falls.
    """

    def __init__(
        self,
        reference: State,
        other: State,
        spec: PermutationSpec,
        *,
        within_head: WithinHead = "permutation",
        scores: Callable[[str, Tensor], Tensor] | None = None,
        start: Reparametrization | None = None,
    ) -> None:
        self.reference, self.other, self.spec = reference, other, spec
        self.within_head = within_head
        self.scores = scores
        self.maps: dict[str, UnitMap] = {} if start is None else dict(start.maps)
        self.history: list[float] = []
        self._values: dict[str, float] = {}
        self._anchored = scores is None and start is None

    def run(
        self, *, max_sweeps: int, generator: torch.Generator, only: Sequence[str] | None = None
    ) -> Reparametrization:
        """Solve the groups in random order, until none gains, and return the best maps.

        A group is solved again only if a group that shares a parameter with it has changed since.

        Args:
            max_sweeps: Most passes over the groups.
            generator: Source of the order.
            only: Groups to solve; default all.
        """
        problems = self._problems(only)
        names = list(problems)
        near = {name: self._neighbours(keys) for name, keys in problems.items()}
        if self._anchored:
            self._anchor(problems)
        waiting = set(names)
        best, best_score, without_gain = dict(self.maps), float("-inf"), 0
        for _ in range(max_sweeps):
            for name in [names[place] for place in torch.randperm(len(names), generator=generator).tolist()]:
                if name in waiting:
                    waiting.discard(name)
                    if self._solve(name, problems[name]):
                        waiting |= {other for other in names if other != name and near[name] & set(problems[other])}
            score = sum(self._values.values())
            self.history.append(score)
            if score > best_score:
                best, best_score, without_gain = dict(self.maps), score, 0
            else:
                without_gain += 1
            if not waiting or without_gain == _PATIENCE:
                break
        self.maps = best
        return Reparametrization(self.spec, best)

    def _anchor(self, problems: Mapping[str, Sequence[str]]) -> None:
        """Find maps to start from, group by group, by the parameters whose other axes are matched already.

        The group with most of them comes first: what reads the input, then what reads that. Parameters of groups in no
        order yet would be noise, which in a deep network outweighs the rest. Kept only if it is no worse than no map.
        """
        before, solved = self._inner_products(), set[str]()
        pinned = self.spec.groups.keys() - {key for keys in problems.values() for key in keys}
        remaining = dict(problems)
        while remaining:
            known = {name: self._known(keys, solved | pinned) for name, keys in remaining.items()}
            name = max(remaining, key=lambda one: (known[one][1], one))
            keys = remaining.pop(name)
            self._solve(name, keys, known[name][0] or None)
            solved |= set(keys)
        self._values.clear()
        if self._inner_products() < before:
            self.maps.clear()

    def _known(self, keys: Sequence[str], solved: Set[str]) -> tuple[set[str], float]:
        """Return the parameters of groups whose other axes are matched, and the sum of their squares."""
        names = set[str]()
        # Chunks of one axis, as of queries, keys and values, do not mix: they are in no other group's way.
        for key in keys:
            for axis in self.spec.groups[key].axes:
                others = [one for one, found in self.spec.axes_of(axis.name) if found.axis != axis.axis]
                if all(other in solved for other in others):
                    names.add(axis.name)
        return names, sum(float(self.reference[name].double().square().sum()) for name in names)

    def _inner_products(self) -> float:
        """Return the sum of the inner products of all parameters with the maps in force."""
        found = Reparametrization(self.spec, self.maps)
        pairs = ((self.reference[name], found.applied(name, self.other[name])) for name in self.spec.moved_names)
        return sum(float((ours.double() * theirs.double()).sum()) for ours, theirs in pairs)

    def _problems(self, only: Sequence[str] | None) -> dict[str, list[str]]:
        """Return the groups that are solved together, by a name."""
        wanted = set(self.spec.groups if only is None else only)
        single = {key: [key] for key in sorted(wanted) if not self.spec.groups[key].heads}
        return single | {order: keys for order, keys in sorted(self.spec.orders().items()) if wanted & set(keys)}

    def _neighbours(self, keys: Sequence[str]) -> set[str]:
        names = {axis.name for key in keys for axis in self.spec.groups[key].axes}
        return {key for name in names for key, _ in self.spec.axes_of(name)} - set(keys)

    def table(self, key: str, names: Set[str] | None = None) -> Tensor:
        """Return the scores ``(n, n)`` of a group's units with the other groups' maps in force: reference x other.

        Args:
            key: The group.
            names: Parameters to go by; default all.
        """
        group = self.spec.groups[key]
        others = Reparametrization(self.spec, {name: m for name, m in self.maps.items() if not self._bound(key, name)})
        total: Tensor | None = None
        for axis in group.axes:
            if names is not None and axis.name not in names:
                continue
            ours = unit_rows(self.reference[axis.name], axis, group.size)
            theirs = unit_rows(others.applied(axis.name, self.other[axis.name]), axis, group.size)
            product = ours @ theirs.to(ours.dtype).T
            total = product if total is None else total.add_(product)
        if total is None:
            return torch.zeros(group.size, group.size)
        return total if self.scores is None else self.scores(key, total)

    def _bound(self, key: str, other: str) -> bool:
        """Whether two groups are one, or share an order of heads."""
        own, found = self.spec.groups[key], self.spec.groups[other]
        return key == other or bool(own.order and own.order == found.order)

    def _solve(self, name: str, keys: Sequence[str], by: Set[str] | None = None) -> bool:
        tables = [self.table(key, by) for key in keys]
        if not self.spec.groups[keys[0]].heads:
            new = {keys[0]: UnitMap(assignment(tables[0]))}
        else:
            new = self._solve_heads(keys, tables)
        pairs = list(zip(keys, tables, strict=True))
        before = sum(_value(table, self.maps.get(key), self.spec.groups[key]) for key, table in pairs)
        after = sum(_value(table, new[key], self.spec.groups[key]) for key, table in pairs)
        gains = after - before > _RELATIVE * abs(after)
        self._values[name] = after if gains else before
        if gains:
            self.maps |= new
        return gains

    def _solve_heads(self, keys: Sequence[str], tables: Sequence[Tensor]) -> dict[str, UnitMap]:
        """Return the best common order of heads, with the best maps within them."""
        groups = [self.spec.groups[key] for key in keys]
        heads = groups[0].heads
        found = [_within(table, group, self.within_head) for table, group in zip(tables, groups, strict=True)]
        order = assignment(torch.stack([values for values, _ in found]).sum(0))
        rows = torch.arange(heads)
        maps = {}
        for key, group, (_, inner) in zip(keys, groups, found, strict=True):
            chosen, size = inner[rows, order], group.head_size
            if chosen.dtype == torch.int64:
                maps[key] = UnitMap((order[:, None] * size + chosen).reshape(-1))
            else:
                maps[key] = UnitMap((order[:, None] * size + torch.arange(size)).reshape(-1), chosen)
        return maps


def _value(table: Tensor, found: UnitMap | None, group: Group) -> float:
    """Return the sum of the scores that a map collects."""
    if found is None:
        return float(table.diagonal().double().sum())
    if found.within is None:
        return float(table[torch.arange(len(table)), found.index].double().sum())
    size = group.head_size
    blocks = table.view(group.heads, size, group.heads, size)
    order = found.index[::size] // size
    chosen = blocks[torch.arange(group.heads), :, order].double()
    return float((chosen * found.within).sum())


def _within(table: Tensor, group: Group, within_head: WithinHead) -> tuple[Tensor, Tensor]:
    """Return the value of every pair of heads, ``(H, H)``, and the best map within: indices or matrices."""
    heads, size = group.heads, group.head_size
    blocks = table.view(heads, size, heads, size).permute(0, 2, 1, 3).double()
    if within_head == "none" or group.rigid:
        stay = torch.arange(size).expand(heads, heads, size)
        return blocks.diagonal(dim1=2, dim2=3).sum(2), stay
    if within_head == "orthogonal":
        u, s, vh = torch.linalg.svd(blocks)
        return s.sum(2), u @ vh
    inner = torch.stack([torch.stack([assignment(block) for block in row]) for row in blocks])
    return blocks.gather(3, inner[..., None]).sum((2, 3)), inner
