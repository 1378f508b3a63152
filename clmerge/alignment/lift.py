"""Make a network larger without changing its function: more blocks, more units (CLAFusion, arXiv 2110.15538)."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from clmerge.alignment.spec import PermutationSpec
from clmerge.weights import State

_BLOCK = re.compile(r"^(?P<before>.*?\b(?:resblocks|blocks)\.)(?P<index>\d+)(?P<after>\..*)$")
_WRITES = re.compile(r"\.(out_proj|c_proj|attn\.proj|fc2)\.(weight|bias)$")


def deepen(state: State, positions: Sequence[int]) -> dict[str, Tensor]:
    """Insert blocks into a transformer of open_clip or timm that add nothing to the residual stream, bit for bit.

    A new block is a copy of the one before it whose last layers of attention and MLP are 0. The task vector of a new
    block is 0.

    Args:
        state: Weights by name.
        positions: Indices of the blocks, ascending, behind each of which one is inserted.

    Raises:
        ValueError: If there are no blocks, or none with such an index.
    """
    found = {name: match for name in state if (match := _BLOCK.match(name))}
    indices = sorted({int(match["index"]) for match in found.values()})
    if not indices or not set(positions) <= set(indices):
        raise ValueError(f"expected positions among the blocks {indices}, got {list(positions)}")
    deeper: dict[str, Tensor] = {name: tensor.clone() for name, tensor in state.items() if name not in found}
    for name, match in found.items():
        index = int(match["index"])
        moved = index + sum(place < index for place in positions)
        deeper[f"{match['before']}{moved}{match['after']}"] = state[name].clone()
        if index in positions:
            copy = torch.zeros_like(state[name]) if _WRITES.search(name) else state[name].clone()
            deeper[f"{match['before']}{moved + 1}{match['after']}"] = copy
    return deeper


def widen(state: State, spec: PermutationSpec, factor: int) -> dict[str, Tensor]:
    """Repeat every unit of every group, so that a network of ``factor`` times the width has the same function.

    What reads units is divided by ``factor``; heads are repeated as wholes, so that there are ``factor`` times as many
    of one size. Task vectors are widened like weights.

    Args:
        state: Weights by name.
        spec: The groups.
        factor: How often a unit is there.

    Raises:
        ValueError: If the factor is below 1, or a tensor is not covered.
    """
    if factor < 1:
        raise ValueError(f"expected a factor of 1 or more, got {factor}")
    spec.check(state)
    wider = {}
    for name, tensor in state.items():
        found = tensor.clone()
        for axis_index in sorted({axis.axis for _, axis in spec.axes_of(name)}):
            parts = []
            own = {axis.part: (key, axis) for key, axis in spec.axes_of(name) if axis.axis == axis_index}
            count = next(iter(own.values()))[1].parts
            for place, chunk in enumerate(found.chunk(count, dim=axis_index)):
                key, axis = own[place]
                group = spec.groups[key]
                repeated = _repeated(chunk, axis_index, group.heads or group.size, factor)
                divides = axis.reads and not (group.heads and axis.axis == 0)  # keys meet queries head by head
                parts.append(repeated / factor if divides else repeated)
            found = torch.cat(parts, dim=axis_index)
        wider[name] = found.contiguous()
    return wider


def _repeated(tensor: Tensor, axis: int, blocks: int, factor: int) -> Tensor:
    """Return a tensor with each of the equal blocks along an axis repeated in place."""
    front = tensor.movedim(axis, 0)
    shape = (blocks, len(front) // blocks, *front.shape[1:])
    return front.reshape(shape).repeat_interleave(factor, 0).flatten(0, 1).movedim(0, axis)


def layer_map(costs: Tensor) -> list[int]:
    """Return, for every layer of a deeper network, the layer of a shallower one that it stands for (CLAFusion).

    The first and the last layers stand for each other, the map never goes back and skips none; its sum of costs is the
    smallest.

    Args:
        costs: How unlike layers are, ``(shallow, deep)``.

    Raises:
        ValueError: If the second network is not the deeper one.

    Example:
        >>> layer_map(torch.tensor([[0.0, 0.1, 9.0], [9.0, 5.0, 0.0]]))
        [0, 0, 1]
    """
    shallow, deep = costs.shape
    if not 1 <= shallow <= deep:
        raise ValueError(f"expected costs of a shallow network's layers by a deeper one's, got {shallow} by {deep}")
    best = torch.full((shallow, deep), torch.inf, dtype=torch.float64)
    best[0, 0] = costs[0, 0]
    for layer in range(1, deep):
        for stands in range(shallow):
            before = best[max(stands - 1, 0) : stands + 1, layer - 1].min()
            best[stands, layer] = before + costs[stands, layer]
    stands, found = shallow - 1, [shallow - 1]
    for layer in range(deep - 1, 0, -1):
        if stands and best[stands - 1, layer - 1] <= best[stands, layer - 1]:
            stands -= 1
        found.append(stands)
    return found[::-1]
