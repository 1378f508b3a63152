"""DC-Merge: merge the coordinates of smoothed task matrices in a basis that all of them share."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.checks import checked_share
from clmerge.merging.spectral.decomposition import polar, tolerance
from clmerge.merging.spectral.triplets import Triplets

_EQUAL = 1e-5  # a task that is merged twice has coordinates that are equal but for rounding


class DCMerge(Triplets):
    """Merge with directional consistency (DC-Merge, arXiv 2603.06242), as an exact stream.

    Of every task matrix the leading ``floor(min(m, n) / T)`` singular triplets are kept, as by ``TSVM``. The polar
    factors of all left and of all right vectors, side by side, are orthonormal bases ``U`` and ``V`` that cover every
    task. In them a task has the coordinates ``U^T tau_t V``, of which the largest are kept and merged as TIES does: the
    mean of those that agree with the sign of the sum. Coordinates between directions of different tasks are set to
    zero, and ``U M V^T`` is the merged matrix. Other parameters are averaged. State: 8 bytes per parameter. An update
    costs one decomposition per matrix, in float64.

    The released code keeps one in a thousand of the ``min(m, n)^2`` coordinates. In narrow layers that would be fewer
    than a task has directions; here at least as many are kept as the task has triplets. It keeps 16 triplets of every
    LoRA update, whatever the number of tasks. Directions that are zero to rounding are left out.

    Args:
        density: Share of the coordinates that is kept, in [0, 1].
        smoothing: Ratio of the largest to the smallest singular value of a task after smoothing; the values between
            are on a line, and their sum stays. 1 makes all equal and 5 is the authors' other choice, both for LoRA.
            Default: the singular values are kept, as they do for full fine-tuning.
        scale: Scaling coefficient; 1 is the paper's rule.

    Raises:
        ValueError: If ``density`` is not a share, or ``smoothing`` is below 1.

    Example:
        >>> merger = DCMerge(smoothing=1.0)
        >>> merger.update({"w": torch.tensor([[3.0, 0.0], [0.0, 1.0]])})
        >>> merger.compute()
        {'w': tensor([[2., 0.],
                [0., 2.]])}
    """

    name = "dc_merge"
    summary = "TIES on the coordinates of smoothed singular vectors in a basis that covers all tasks"
    source = "2603.06242"

    def __init__(
        self,
        density: float = 1e-3,
        *,
        smoothing: float | None = None,
        scale: float = 1.0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        split_qkv: bool = False,
    ) -> None:
        super().__init__(scale, include=include, exclude=exclude, split_qkv=split_qkv)
        self.density = checked_share("density", density)
        if smoothing is not None and not smoothing >= 1:
            raise ValueError(f"expected smoothing of 1 or more, got {smoothing}: 1 makes all singular values equal")
        self.smoothing = smoothing

    @override
    def _recombined(self, left: Tensor, right: Tensor) -> Tensor:
        dtype, rank = right.dtype, len(right)
        share = rank // self.num_tasks
        vectors = right.double()
        s = vectors.norm(dim=1)
        live = s > tolerance(dtype, right.shape) * s.max()
        if not live.any():
            return torch.zeros_like(vectors)
        u, s, vh = left.double()[:, live], s[live], vectors[live] / s[live].unsqueeze(1)
        owners = (torch.arange(rank, device=s.device) // share)[live]
        cover_u, cover_v = polar(u, dtype), polar(vh, dtype)
        coordinates = []
        for task in range(self.num_tasks):
            own = owners == task
            parts = (cover_u.t() @ u[:, own]) * self._smoothed(s[own]) @ (vh[own] @ cover_v.t())
            coordinates.append(_largest(parts, max(share, int(self.density * rank**2))))
        merged = _elected_mean(torch.stack(coordinates)) * (owners.unsqueeze(1) == owners)
        recombined: Tensor = cover_u @ (merged * self.scale) @ cover_v
        return recombined

    def _smoothed(self, s: Tensor) -> Tensor:
        if self.smoothing is None or not len(s):
            return s
        ratio = min(self.smoothing, float(s[0] / s[-1]))
        line = torch.linspace(ratio, 1.0, len(s), dtype=s.dtype, device=s.device)
        return line * (s.sum() / line.sum())


def _largest(matrix: Tensor, count: int) -> Tensor:
    """Return a matrix without all but its largest entries, and those that equal the last of them to rounding."""
    sizes = matrix.abs()
    threshold = sizes.flatten().topk(min(count, sizes.numel())).values[-1]
    return torch.where(sizes >= threshold * (1 - _EQUAL), matrix, 0.0)


def _elected_mean(stacked: Tensor) -> Tensor:
    """Return the mean of the entries that have the sign of the sum over the tasks, zero where the sum is."""
    sign = stacked.sum(dim=0).sign()
    agree = stacked.sign() == sign
    return (stacked * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1) * sign.abs()
