"""Spectral rules without a stream of constant size: the task vectors are kept, and merged when they are read."""

from torch import Tensor

from clmerge.merging.accumulators import Slots
from clmerge.merging.spectral.decomposition import _Spectral
from clmerge.merging.stored import _Stored


class _KeptSpectral(_Spectral, _Stored):
    """A spectral rule that needs every task matrix against something all of them determine."""

    def _task_matrices(self, name: str, slots: Slots) -> list[list[Tensor]]:
        """Return, for every matrix of a parameter, that of each task in float64; nothing for what is no matrix."""
        by_task = [self._matrices.pieces(name, tau) for tau in self._taus(slots)]
        return [[piece.double() for piece in pieces] for pieces in zip(*by_task, strict=True)]
