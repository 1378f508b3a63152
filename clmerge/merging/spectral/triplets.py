"""Base of the rules that keep the leading singular triplets of every task, in equal shares of the rank."""

from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots, float_dtype
from clmerge.merging.spectral.decomposition import Spectral
from clmerge.merging.step import Step


class Triplets(Spectral):
    """Base of the rules that keep the leading ``floor(min(m, n) / T)`` singular triplets of every task matrix.

    The share of a task shrinks as tasks are added, and fewer leading triplets are a prefix of more: each update drops
    the last triplets of every task, so their total never exceeds ``min(m, n)`` and the stream is exact. Parameters that
    are not matrices are averaged. State: 8 bytes per parameter. An update costs one decomposition per matrix, in
    float64.

    Args:
        scale: Scaling coefficient; 1 is the plain rule.
    """

    # Of a wide matrix (m <= n), "left" has the left singular vectors in its first m columns, and the rows of
    # "right" are the right ones times their singular values; of a tall one both are transposed. Of what is no
    # matrix, "right" is the sum.
    slots = ("left", "right")

    @override
    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        lefts, rights = (self._wide(name, slots[slot]) for slot in ("left", "right"))
        if not lefts:
            slots["right"].add_(tau)
        for left, right, matrix in zip(lefts, rights, self._wide(name, tau), strict=True):
            u, s, vh = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
            _append(left, right, step.position, u, s.unsqueeze(1) * vh, 1)

    @override
    def _read(self, name: str, slots: Slots, overview: Any) -> Tensor:
        merged = torch.empty_like(slots["right"])
        outputs = self._wide(name, merged)
        if not outputs:
            return slots["right"] * (self.scale / self.num_tasks)
        lefts, rights = (self._wide(name, slots[slot]) for slot in ("left", "right"))
        for output, left, right in zip(outputs, lefts, rights, strict=True):
            output.copy_(self._recombined(left[:, : len(right)], right))
        return merged

    @abstractmethod
    def _recombined(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the merged matrix, wide, in float64, from the triplets of all tasks.

        Args:
            left: Left singular vectors in columns, shape ``(m, m)``: of every task an equal share.
            right: Right singular vectors times singular values in rows, shape ``(m, n)``.
        """

    @override
    def _join(self, other: Self) -> None:
        if not self.num_tasks:
            super()._join(other)
            return
        for name, slots in self._slots.items():
            dtype = float_dtype(slots)
            theirs = {slot: tensor.to(slots[slot].device, dtype) for slot, tensor in other._slots[name].items()}
            if not self._matrices.pieces(name, slots["left"]):
                slots["right"].add_(theirs["right"])
                continue
            wide = (self._wide(name, side[slot]) for side in (slots, theirs) for slot in ("left", "right"))
            for left, right, their_left, their_right in zip(*wide, strict=True):
                rank = len(right)
                _append(left, right, self.num_tasks, their_left[:, :rank], their_right, other.num_tasks)

    def _wide(self, name: str, tensor: Tensor) -> list[Tensor]:
        """Return wide views (m <= n) of the matrices of a parameter or of its accumulator."""
        return [
            piece if piece.shape[0] <= piece.shape[1] else piece.t() for piece in self._matrices.pieces(name, tensor)
        ]


def _append(left: Tensor, right: Tensor, ours: int, their_left: Tensor, their_right: Tensor, theirs: int) -> None:
    """Append the triplets of further tasks to the kept ones, in place; every task keeps its leading triplets.

    Args:
        left: Left singular vectors of ``ours`` tasks in columns, shape ``(m, n)``, in equal shares of ``m`` columns.
        right: Right singular vectors times singular values in rows, shape ``(m, n)``.
        ours: Number of tasks in ``left`` and ``right``.
        their_left: Left singular vectors of the further tasks, shape ``(m, m)``.
        their_right: Scaled right ones, shape ``(m, n)``.
        theirs: Number of further tasks.
    """
    rank = len(right)
    share = rank // (ours + theirs)
    kept_left, kept_right = [], []
    for columns, rows, count in ((left, right, ours), (their_left, their_right, theirs)):
        for task in range(count):
            start = task * (rank // count)
            kept_left.append(columns[:, start : start + share].to(left.dtype))
            kept_right.append(rows[start : start + share].to(right.dtype))
    new_left, new_right = torch.cat(kept_left, dim=1), torch.cat(kept_right)
    for kept, new in ((left, new_left), (right.t(), new_right.t())):
        kept.zero_()
        kept[:, : new.shape[1]].copy_(new)
