"""Match more than two networks at once: one map of each of them to a common order of units, the universe."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from clmerge.alignment.descent import Descent
from clmerge.alignment.pairs import assignment, unit_rows
from clmerge.alignment.reparametrization import Reparametrization, UnitMap, blockwise
from clmerge.alignment.spec import PermutationSpec
from clmerge.weights import State

_TOLERANCE = 1e-6
_PATIENCE = 5
_Soft = list[dict[str, Tensor]]


class Universe:
    """Match K networks to one universe, so that maps between them agree: from 1 to 2 to 3 is from 1 to 3.

    First Frank-Wolfe on doubly stochastic matrices for the sum of the inner products of all pairs of networks (C2M3;
    Crisostomi et al., arXiv 2405.17897), then, for attention heads too, every network in turn is matched to the mean of
    the others until none moves (merge-many of Git Re-Basin, arXiv 2209.04836, algorithm 3), which never lowers the sum.

    Args:
        steps: Most steps of Frank-Wolfe; 0 for merge-many alone. A step needs ``n^2`` numbers per group and network.
        within_head: Maps within attention heads.
        max_sweeps: Most rounds of merge-many.
        seed: Seed of the orders.

    Example:
        >>> from torch import nn
        >>> from clmerge.alignment import spec_of
        >>> nets = [nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)) for _ in range(3)]
        >>> maps = Universe().match([net.state_dict() for net in nets], spec_of(nets[0]))
        >>> one_two, two_three = maps[1].inverse().compose(maps[0]), maps[2].inverse().compose(maps[1])
        >>> direct = maps[2].inverse().compose(maps[0])
        >>> torch.equal(two_three.compose(one_two).maps["hidden.0"].index, direct.maps["hidden.0"].index)
        True
    """

    def __init__(
        self,
        steps: int = 200,
        *,
        within_head: Literal["none", "permutation", "orthogonal"] = "permutation",
        max_sweeps: int = 100,
        seed: int = 0,
    ) -> None:
        if steps < 0 or max_sweeps < 1:
            raise ValueError(f"expected steps of 0 and max_sweeps of 1 or more, got {steps} and {max_sweeps}")
        self.steps = steps
        self.within_head = within_head
        self.max_sweeps = max_sweeps
        self.seed = seed

    def match(self, models: Sequence[State], spec: PermutationSpec) -> list[Reparametrization]:
        """Return the map of every network to the universe.

        Args:
            models: Weights by the same names; two networks or more.
            spec: The groups of their architecture.

        Raises:
            ValueError: If there are fewer than two, or a parameter is missing or of another size.
        """
        if len(models) < 2:
            raise ValueError(f"expected two networks or more, got {len(models)}")
        states = []
        for place, model in enumerate(models):
            state = {name: model[name].detach() for name in spec.moved_names if name in model}
            spec.check(state, origin=f"network {place}", whole=True)
            states.append(state)
        generator = torch.Generator().manual_seed(self.seed)
        found = [Reparametrization(spec, maps) for maps in self._frank_wolfe(states, spec)]
        moved = [one.apply(state) for one, state in zip(found, states, strict=True)]
        for _ in range(self.max_sweeps):
            changed = False
            for place in torch.randperm(len(states), generator=generator).tolist():
                others = [state for other, state in enumerate(moved) if other != place]
                mean = {name: torch.stack([state[name] for state in others]).mean(0) for name in moved[place]}
                descent = Descent(mean, states[place], spec, within_head=self.within_head, start=found[place])
                new = descent.run(max_sweeps=100, generator=torch.Generator().manual_seed(self.seed))
                before, after = found[place].state_dict(), new.state_dict()
                if before.keys() != after.keys() or any(not torch.equal(before[key], after[key]) for key in after):
                    applied = new.apply(states[place])
                    gain = sum(float(((applied[k] - moved[place][k]) * mean[k]).double().sum()) for k in mean)
                    if gain > 0:
                        found[place], moved[place], changed = new, applied, True
            if not changed:
                break
        return found

    def _frank_wolfe(self, states: Sequence[State], spec: PermutationSpec) -> list[dict[str, UnitMap]]:
        """Return permutations of the groups without heads, by network."""
        keys = [key for key, group in spec.groups.items() if not group.heads]
        soft: _Soft = [{key: torch.eye(spec.groups[key].size, dtype=torch.float64) for key in keys} for _ in states]
        value, stalled = _agreement([_applied(s, spec, p) for s, p in zip(states, soft, strict=True)]), 0
        for _ in range(self.steps):
            moved = [_applied(s, spec, p) for s, p in zip(states, soft, strict=True)]
            total = {name: sum((state[name] for state in moved), torch.zeros(())) for name in moved[0]}
            best: _Soft = [
                {key: _corner(_gradient(key, place, states, moved, total, spec, soft)) for key in keys}
                for place in range(len(states))
            ]

            loss = partial(_loss, states, spec, soft, best)
            found = minimize_scalar(loss, bounds=(0.0, 1.0), method="bounded", options={"maxiter": 20, "xatol": 1e-3})
            share = float(found.x) if float(found.fun) <= loss(1.0) else 1.0
            new = -loss(share)
            soft = [_mixed(p, b, share) for p, b in zip(soft, best, strict=True)]
            stalled = stalled + 1 if new - value < _TOLERANCE * max(1.0, abs(value)) else 0
            value = new
            if stalled == _PATIENCE:
                break
        return [{key: UnitMap(assignment(p[key])) for key in keys} for p in soft]


def _loss(states: Sequence[State], spec: PermutationSpec, soft: _Soft, best: _Soft, share: float) -> float:
    """Return minus the agreement of networks whose matrices lie between two."""
    mixed = [_mixed(p, b, share) for p, b in zip(soft, best, strict=True)]
    return -_agreement([_applied(s, spec, p) for s, p in zip(states, mixed, strict=True)])


def _mixed(old: Mapping[str, Tensor], new: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    return {key: torch.lerp(old[key], new[key], share) for key in old}


def _corner(scores: Tensor) -> Tensor:
    """Return the permutation matrix with the largest inner product."""
    return torch.eye(len(scores), dtype=torch.float64)[assignment(scores)]


def _applied(state: State, spec: PermutationSpec, soft: Mapping[str, Tensor], *, but: str = "") -> dict[str, Tensor]:
    """Return weights in float64 with the units of groups mixed by matrices, ``but`` those of one group."""
    moved = {}
    for name, tensor in state.items():
        found = tensor.double()
        for key, axis in spec.axes_of(name):
            if key in soft and key != but:
                found = blockwise(found, axis.axis, soft[key][None], axis.spread)
        moved[name] = found
    return moved


def _agreement(moved: Sequence[Mapping[str, Tensor]]) -> float:
    """Return the sum of the inner products of all pairs."""
    value = 0.0
    for name in moved[0]:
        total = sum((state[name] for state in moved), torch.zeros(()))
        value += float(total.square().sum()) - sum(float(state[name].square().sum()) for state in moved)
    return value / 2


def _gradient(
    key: str,
    place: int,
    states: Sequence[State],
    moved: Sequence[Mapping[str, Tensor]],
    total: Mapping[str, Tensor],
    spec: PermutationSpec,
    soft: _Soft,
) -> Tensor:
    """Return the derivative of the agreement by one network's matrix of one group."""
    group = spec.groups[key]
    names = {axis.name: states[place][axis.name] for axis in group.axes}
    own = _applied(names, spec, soft[place], but=key)
    gradient = torch.zeros(group.size, group.size, dtype=torch.float64)
    for axis in group.axes:
        others = total[axis.name] - moved[place][axis.name]
        gradient += unit_rows(others, axis, group.size) @ unit_rows(own[axis.name], axis, group.size).T
    return gradient
