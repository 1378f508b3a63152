"""Carry task vectors over by rotations of what linear layers read and write, between bases of any widths."""

from collections.abc import Iterable

import torch
from torch import Tensor

from clmerge.alignment.activations import FEATURES, rotations
from clmerge.alignment.transport import Swap, Transport
from clmerge.weights import State, TaskVector


class Procrustes(Transport):
    """Rotate every linear layer's change by orthogonal maps of its inputs and outputs (Theseus, arXiv 2602.12952).

    ``tau' = T_out^T tau T_in``, with maps fitted to what both bases compute on the same images. The widths may differ.
    What is no linear layer (embeddings, positions, norms, CLIP's final projection) gets no change: a rotation is no
    symmetry there.

    Args:
        images: Number of images, without labels.
        scale: Factor of the transported vector.
    """

    data = "images"

    def __init__(self, images: int = 256, *, scale: float = 1.0) -> None:
        if images < 1:
            raise ValueError(f"expected images of 1 or more, got {images}")
        self.images = images
        self.scale = scale
        self._maps: dict[str, tuple[list[Tensor], Tensor]] = {}
        self._zero: dict[str, Tensor] = {}

    def prepare(self, swap: Swap) -> None:
        """Fit the maps."""
        theirs = swap.weights()[1]
        if missing := [name for name in swap.names if name not in theirs]:
            raise ValueError(f"expected layers of the same names in the new base, got none named {missing[0]!r}")
        axes = [axis for group in swap.spec().groups.values() for axis in group.axes if axis.axis == 0]
        parts = {axis.name: axis.parts for axis in axes}
        self._maps = rotations(swap.source, swap.target, parts, swap.images(self.images))
        self._zero = {name: torch.zeros_like(theirs[name], dtype=torch.float32, device="cpu") for name in swap.names}

    def transport(self, tau: State, task: int) -> TaskVector:
        """Return the rotated vector, in the shapes of the new base."""
        moved = {name: zero.clone() for name, zero in self._zero.items()}
        for weight, (outs, ins) in self._maps.items():
            bias = weight.replace("in_proj_weight", "in_proj_bias").replace(".weight", ".bias")
            if weight in tau:
                rows = [out.T @ part.double() @ ins for out, part in _parts(outs, tau[weight])]
                moved[weight] = self.scale * torch.cat(rows).to(tau[weight].dtype)
            if bias in tau and bias != weight:
                whole = torch.cat([out.T @ part.double() for out, part in _parts(outs, tau[bias])])
                moved[bias] = self.scale * whole.to(tau[bias].dtype)
        return moved

    def features(self, weights: Tensor) -> Tensor:
        """Return the weights with the features rotated as both bases compute them."""
        turn = self._maps[FEATURES][1]
        return (weights.double() @ turn).to(weights.dtype)


def _parts(outs: list[Tensor], tensor: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(outs, tensor.chunk(len(outs)), strict=True)
