"""KnOTS: put the task matrices into one shared basis, and merge their coordinates with TIES."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.orientation import outputs_first
from clmerge.merging.sign.ties import TIES, MergeKind, Trim
from clmerge.merging.spectral.decomposition import Spectral, live_svd
from clmerge.merging.stored import Stored
from clmerge.weights.task_vector import TaskVector


class KnOTS(Spectral, Stored):
    """Merge the coordinates of the task matrices in a common basis with TIES (arXiv 2410.19735).

    With ``U S [V_1 ... V_T]`` the singular value decomposition of the task matrices side by side, task t has the
    coordinates ``S V_t`` in the basis ``U`` of the output space: matrices are (out, in), and CLIP's ``proj`` and
    ``text_projection``, which are stored as (in, out), are transposed. TIES merges the coordinates, and ``U`` times
    the result is the merged matrix. Other parameters are averaged; the paper has none, because it merges LoRA updates
    (pass them as dense matrices).

    TIES merges the coordinates with the singular values multiplied in, as in the authors' configurations.

    The basis changes with every task, so the task vectors are kept. State: 4 bytes per parameter and task, or none
    with a bank; reading costs one decomposition of ``(m, T n)`` per matrix, in float64, and about 50
    bytes per parameter.

    Args:
        density: Share of a task's coordinates that the trim of TIES keeps, in (0, 1].
        trim: ``"model"``: one threshold for all coordinates of a task (the paper); ``"tensor"``: one per matrix.
        merge: ``"mean"`` (the paper), ``"sum"`` or ``"max"``; see ``TIES``.
        scale: Scaling coefficient; the authors search it and use 0.6 for eight vision tasks.

    Raises:
        ValueError: If an argument of TIES is out of range.

    Example:
        >>> merger = KnOTS(density=1.0)
        >>> merger.update({"w": torch.tensor([[2.0, 0.0], [0.0, 0.0]])})
        >>> merger.update({"w": torch.tensor([[4.0, 0.0], [0.0, 1.0]])})
        >>> merger.compute()
        {'w': tensor([[3., 0.],
                [0., 1.]])}
    """

    name = "knots"
    summary = "TIES in a basis the task matrices share"
    source = "2410.19735"
    reading_bytes = (
        52  # in float64: basis, coordinates of one task, what TIES keeps (20), coordinates and matrix merged
    )

    def __init__(
        self,
        density: float = 0.2,
        *,
        trim: Trim = "model",
        merge: MergeKind = "mean",
        scale: float = 1.0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        split_qkv: bool = False,
    ) -> None:
        super().__init__(scale, include=include, exclude=exclude, split_qkv=split_qkv)
        ties = TIES(density, trim=trim, merge=merge)
        self.density = density
        self.trim: Trim = trim
        self.merge: MergeKind = merge
        self._ties = ties
        if trim == "model":
            self.scope = "model"

    @override
    def _overview(self) -> TaskVector:
        """Return the merged matrices by the name and the index of the piece."""
        bases: dict[str, list[Tensor]] = {}
        for name, slots in self._held().items():
            matrices = self._matrices.by_matrix(name, self._taus(slots))
            if matrices:
                dtype = slots["task0"].dtype
                bases[name] = [
                    live_svd(torch.cat([outputs_first(name, tau) for tau in taus], dim=1), dtype)[0]
                    for taus in matrices
                ]
        if not bases:
            return {}
        self._ties.reset()
        for position in range(self.num_tasks):
            self._ties.update(self._coordinates(position, bases))
        parts = self._ties.compute()
        self._ties.reset()
        return {
            _key(name, index): basis @ parts.pop(_key(name, index))
            for name, own in bases.items()
            for index, basis in enumerate(own)
        }

    def _coordinates(self, position: int, bases: dict[str, list[Tensor]]) -> TaskVector:
        """Return ``S V_t``, which is ``U^T`` times the matrix of the task; only one task is in memory at a time."""
        found = {}
        for name, own in bases.items():
            pieces = self._matrices.pieces(name, self._tau(position, name))
            for index, (basis, piece) in enumerate(zip(own, pieces, strict=True)):
                found[_key(name, index)] = basis.t() @ outputs_first(name, piece.double())
        return found

    @override
    def _read(self, name: str, slots: Slots, overview: TaskVector) -> Tensor:
        taus = self._taus(slots)
        count = len(self._matrices.pieces(name, taus[0]))
        if not count:
            return torch.stack(taus).mean(dim=0) * self.scale
        merged = torch.cat([overview[_key(name, index)] for index in range(count)]).mul_(self.scale)
        return outputs_first(name, merged).to(taus[0].dtype).contiguous()


def _key(name: str, index: int) -> str:
    return f"{name}/{index}"
