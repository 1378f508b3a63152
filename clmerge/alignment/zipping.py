"""Zip networks: join the most similar units, of one network or of several, and average what is joined."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clmerge.alignment.reparametrization import blockwise
from clmerge.alignment.spec import PermutationSpec
from clmerge.weights import State


def zipped(
    models: Sequence[State],
    spec: PermutationSpec,
    correlations: Mapping[str, Tensor],
    *,
    within: float = 0.125,
    shrink: float = 0.3,
) -> dict[str, Tensor]:
    """Return the zip of networks of one architecture (ZipIt; Stoica et al., arXiv 2305.03053).

    Of the K n units of a group pairs are joined, the most similar first, until n are left; a unit of the zip is the
    mean of those that it joins, and its readers are added up. Not for attention heads, whose groups must be pinned
    (``spec.without``): the zip is no symmetry. Running statistics must be estimated again.

    Args:
        models: Weights by the same names.
        spec: The groups.
        correlations: By group: correlations of all units of all networks, ``(K n, K n)``, network by network.
        within: Largest share of a group's joins between units of one network.
        shrink: Factor of the similarity of what was joined, the smallest of its parts'.

    Raises:
        ValueError: If a group has heads, or correlations are missing or of another size.
    """
    count = len(models)
    merges: dict[str, tuple[Tensor, Tensor]] = {}
    for key, group in spec.groups.items():
        if group.heads:
            raise ValueError(f"expected groups without heads, got {key!r}: pin it with spec.without")
        found = correlations.get(key)
        if found is None or found.shape != (count * group.size, count * group.size):
            shape = None if found is None else tuple(found.shape)
            raise ValueError(f"expected correlations of {count} times {group.size} units for {key!r}, got {shape}")
        owners = torch.arange(count).repeat_interleave(group.size)
        merges[key] = _joined(found.double(), owners, group.size, within, shrink)
    result = {}
    for name in models[0]:
        parts = []
        writes = False
        for place, model in enumerate(models):
            tensor = model[name].double()
            for key, axis in spec.axes_of(name):
                write, read = merges[key]
                size = spec.groups[key].size
                own = slice(place * size, (place + 1) * size)
                matrix = read[own].T if axis.reads else write[:, own]
                writes = writes or not axis.reads
                tensor = blockwise(tensor, axis.axis, matrix[None], axis.spread)
            parts.append(tensor)
        total = torch.stack(parts).sum(0)
        result[name] = (total if writes else total / count).to(models[0][name].dtype)
    return result


def _joined(similarity: Tensor, owners: Tensor, size: int, within: float, shrink: float) -> tuple[Tensor, Tensor]:
    """Return the matrix that averages joined units, ``(n, K n)``, and the one that copies them back, ``(K n, n)``."""
    total = len(similarity)
    table = similarity.clone()
    table.fill_diagonal_(-torch.inf)
    clusters = {place: [place] for place in range(total)}
    budget = int(within * (total - size))
    while len(clusters) > size:
        flat = int(table.argmax())
        first, second = divmod(flat, total)
        inside = {int(owners[i]) for i in clusters[first] + clusters[second]}
        if len(inside) == 1:
            if not budget:
                same = owners[:, None] == owners
                alone = torch.tensor([len({int(owners[i]) for i in clusters.get(p, [p])}) == 1 for p in range(total)])
                table[same & alone[:, None] & alone] = -torch.inf
                if torch.isinf(table).all():
                    raise ValueError(f"expected pairs of units to join, got none within the share {within}")
                budget = -1
                continue
            if budget > 0:
                budget -= 1
        clusters[first] += clusters.pop(second)
        lowest = shrink * torch.minimum(table[first], table[second])
        table[first], table[:, first] = lowest, lowest
        table[second], table[:, second] = -torch.inf, -torch.inf
        table[first, first] = -torch.inf
    write = torch.zeros(size, total, dtype=torch.float64)
    for row, members in enumerate(clusters.values()):
        write[row, members] = 1.0 / len(members)
    return write, (write > 0).double().T
