"""Spectral rules that keep every task vector and merge them when the result is read."""

from torch import Tensor

from clmerge.merging.accumulators import Slots
from clmerge.merging.spectral.decomposition import _Spectral
from clmerge.merging.stored import _Stored


class _KeptSpectral(_Spectral, _Stored):
    """A spectral rule that compares every task matrix with a basis that depends on all of them."""

    def _task_matrices(self, name: str, slots: Slots) -> list[list[Tensor]]:
        """Return the float64 task matrices for every matrix of a parameter; empty if it is not a matrix."""
        by_task = [self._matrices.pieces(name, tau) for tau in self._taus(slots)]
        return [[piece.double() for piece in pieces] for pieces in zip(*by_task, strict=True)]
