"""Isotropic merging in common and task-specific subspaces."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.checks import checked_share
from clmerge.merging.spectral.decomposition import Spectral, live_svd, polar
from clmerge.merging.stored import Stored


class IsoCTS(Spectral, Stored):
    """Flatten the spectrum of common and task-specific directions together (Iso-CTS, arXiv 2502.04959).

    Of ``r = min(m, n)`` directions of a matrix, about the share ``common`` are the leading ones of ``sum(tau_t)``. The
    rest is divided evenly among the tasks: each contributes the leading singular triplets of its matrix projected
    orthogonally to the common left space (the official code projects that side only). The vectors are orthogonalised
    as in ``TSVM``, and all singular values are replaced by their mean. Other parameters are averaged.

    The common space depends on all tasks, so the task vectors are kept. State: 4 bytes per parameter and task, or none
    with a bank; reading costs ``T + 3`` decompositions per matrix, in float64. ``IsoC`` needs neither.

    Directions that are zero to rounding are left out; the official code fills them with arbitrary ones. The mean is
    over ``r`` values in both.

    Args:
        common: Share of the directions that is common, in [0, 1]; adjusted so that the rest divides evenly among the
            tasks.
        scale: Scaling coefficient; the authors search 0.1 to 3.

    Raises:
        ValueError: If ``common`` is out of range.

    Example:
        >>> merger = IsoCTS(common=0.5)
        >>> merger.update({"w": torch.tensor([[3.0, 0.0], [0.0, 1.0]])})
        >>> merger.compute()
        {'w': tensor([[2., 0.],
                [0., 2.]])}
    """

    name = "iso_cts"
    summary = "flat spectrum over common and task-specific directions"
    source = "2502.04959"

    def __init__(
        self,
        common: float = 0.8,
        *,
        scale: float = 1.0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        split_qkv: bool = False,
    ) -> None:
        super().__init__(scale, include=include, exclude=exclude, split_qkv=split_qkv)
        self.common = checked_share("common", common)

    @override
    def _read(self, name: str, slots: Slots, overview: Any) -> Tensor:
        taus = self._taus(slots)
        pieces = self._matrices.by_matrix(name, taus)
        if not pieces:
            return torch.stack(taus).mean(dim=0) * self.scale
        return torch.cat([self._flattened(piece, taus[0].dtype) for piece in pieces]).to(taus[0].dtype)

    def _flattened(self, taus: list[Tensor], dtype: torch.dtype) -> Tensor:
        total = torch.stack(taus).sum(dim=0)
        size = min(total.shape)
        share = min(round((size - int(size * self.common)) / len(taus)), size // len(taus))
        common = size - share * len(taus)
        u, s, vh = live_svd(total, dtype)
        basis = u[:, :common]
        parts = [(basis.t(), s[:common], vh[:common])]
        for tau in taus if share else []:
            u, s, vh = live_svd(tau - basis @ (basis.t() @ tau), dtype, largest=float(tau.norm()))
            parts.append((u[:, :share].t(), s[:share], vh[:share]))
        rows_u, values, rows_v = (torch.cat(part) for part in zip(*parts, strict=True))
        flat: Tensor = polar(rows_u.t(), dtype) * (self.scale * values.sum() / size)
        return flat @ polar(rows_v, dtype)
