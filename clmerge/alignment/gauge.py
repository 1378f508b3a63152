"""The balanced gauge of attention heads, which removes the freedom of their bases up to rotations."""

import torch
from torch import Tensor

from clmerge.alignment.pairs import unit_rows
from clmerge.alignment.reparametrization import Reparametrization, UnitMap
from clmerge.alignment.spec import Axis, Group, PermutationSpec
from clmerge.weights import State

_SINGULAR = 1e-8


def balanced(state: State, spec: PermutationSpec) -> Reparametrization:
    """Return the map to the gauge in which queries and keys of a head (or values and outputs) have one spectrum.

    With ``X`` the rows that write a head's units and ``Y`` the rows that read them, ``X^T Y`` is all that the function
    depends on; of its singular value decomposition ``U S V^T`` the balanced rows are ``S^(1/2) U^T`` and
    ``S^(1/2) V^T``. Networks that differ by any invertible maps within heads differ by rotations then.

    Args:
        state: Weights of all parameters of the groups of heads.
        spec: The groups. Heads whose rows are linearly dependent, and rigid groups, stay as they are.
    """
    maps = {}
    for key, group in spec.groups.items():
        if group.heads and not group.rigid:
            writes = _stacked(state, group, reads=False)
            # The keys' bias adds the same to all logits of a query, so that softmax cancels it.
            reads = _stacked(state, group, reads=True)
            matrices = torch.stack([_balance(x, y) for x, y in zip(writes, reads, strict=True)])
            maps[key] = UnitMap(torch.arange(group.size), matrices)
    return Reparametrization(spec, maps)


def _stacked(state: State, group: Group, *, reads: bool) -> Tensor:
    """Return the rows of every head side by side, ``(heads, d, columns)``; readers without their biases."""

    def counts(axis: Axis) -> bool:
        return axis.reads == reads and (not reads or state[axis.name].ndim > 1)

    rows = [unit_rows(state[axis.name], axis, group.size).double() for axis in group.axes if counts(axis)]
    return torch.cat(rows, dim=1).view(group.heads, group.head_size, -1)


def _balance(writes: Tensor, reads: Tensor) -> Tensor:
    left, right = torch.linalg.qr(writes.T)[1], torch.linalg.qr(reads.T)[1]
    u, s, _ = torch.linalg.svd(left @ right.T)
    if left.shape[0] < len(writes) or float(s[-1]) <= _SINGULAR * float(s[0]):
        return torch.eye(len(writes), dtype=torch.float64)
    turned: Tensor = torch.linalg.solve(left, u)
    result: Tensor = s.sqrt()[:, None] * turned.T
    return result
