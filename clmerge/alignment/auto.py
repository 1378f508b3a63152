"""Choose a transport by the barrier between the bases."""

from torch import Tensor
from typing_extensions import override

from clmerge.alignment.barrier import barrier
from clmerge.alignment.matching import Aligner
from clmerge.alignment.procrustes import Procrustes
from clmerge.alignment.transport import Identity, Permuted, Swap, Transport
from clmerge.weights import State, TaskVector

_FAR = 0.5
"""Barrier above which vectors carried little over, between two pretraining seeds of a ViT."""


class Auto(Transport):
    """Choose by the barrier between the bases: Identity if there is none, Permuted if matching lowers it.

    The barrier is how far the features midway between the bases are from the mean of theirs, as a share of it. For
    bases of other shapes it is Procrustes.

    Args:
        images: Number of training images, without labels.
        tolerance: Largest barrier that counts as none.
        aligner: For Permuted; default ``WeightMatching``.
    """

    data = "images"

    def __init__(self, images: int = 256, *, tolerance: float = 0.1, aligner: Aligner | None = None) -> None:
        if images < 1:
            raise ValueError(f"expected images of 1 or more, got {images}")
        self.images = images
        self.tolerance = tolerance
        self.aligner = aligner
        self._chosen: Transport | None = None

    @property
    @override
    def chosen(self) -> Transport:
        """The transport that was chosen."""
        assert self._chosen is not None
        return self._chosen

    def prepare(self, swap: Swap) -> None:
        """Measure the barrier, choose, and prepare the choice."""
        ours, theirs = swap.weights()
        if any(name not in theirs or theirs[name].shape != ours[name].shape for name in swap.names):
            self._choose(Procrustes(), swap, "the bases have other shapes")
            return
        batches = list(swap.images(self.images))
        before = barrier(swap.target, theirs, ours, batches)
        self.barriers = {"before": before}
        if before <= self.tolerance:
            self._choose(Identity(), swap, f"the barrier between the bases is {before:.3f}")
            return
        permuted = Permuted(self.aligner)
        permuted.prepare(swap)
        assert permuted.aligned is not None
        moved = permuted.aligned.apply({name: ours[name] for name in permuted.aligned.spec.moved_names})
        after = barrier(swap.target, theirs, {**ours, **moved}, batches)
        self.barriers = {"before": before, "after": after}
        if after < before:
            self._chosen, self.aligned = permuted, permuted.aligned
            self.why = f"matching lowers the barrier from {before:.3f} to {after:.3f}"
            if after > _FAR:
                self.why += ", far from 0: expect little, and compare with fine-tuning on a few images"
        else:
            self._choose(Identity(), swap, f"matching does not lower the barrier of {before:.3f}: {after:.3f}")

    def _choose(self, transport: Transport, swap: Swap, why: str) -> None:
        transport.prepare(swap)
        self._chosen, self.aligned, self.why = transport, transport.aligned, why

    def transport(self, tau: State, task: int) -> TaskVector:
        """As the chosen transport."""
        return self.chosen.transport(tau, task)

    def features(self, weights: Tensor) -> Tensor:
        """As the chosen transport."""
        return self.chosen.features(weights)
