"""Ethos: unlearn only the large components of a task vector in the base model's singular basis."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.checks import checked_share
from clmerge.merging.norms import vector_norm
from clmerge.merging.removal import Removable
from clmerge.merging.required import base_weights
from clmerge.merging.spectral.decomposition import Spectral, live_svd
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State


class Ethos(Spectral, Removable):
    """Negate the part of the task vectors that is large in the base model's basis (Ethos, arXiv 2403.08994).

    With ``W0 = U S V^T`` a weight matrix of the base model, ``C = U^T tau V`` are the coordinates of a task matrix.
    Coordinates below ``threshold * max|C|`` count as general knowledge and are kept; the others are unlearned, and so
    is the component outside of the space of W0: the result is ``-strength * sum(tau_t - U small(C_t) V^T)``. Parameters
    that are not matrices are unchanged, because the paper edits matrices only.

    The released code adds the task vector of an auxiliary task that is to be kept, and takes the basis of W0 plus that
    vector: to do the same, pass those weights as the statistic and add the vector yourself. It compares with the
    largest coordinate instead of the largest magnitude. For matrices that are not square it filters the component
    outside of the space of W0 in an arbitrary basis; here that component is negated as a whole.

    The weights of the base model are a statistic of every update: ``statistics={"weights": theta0}``, which
    ``MergeCallback`` passes itself. State: 4 bytes per parameter. An update costs one decomposition per matrix, in
    float64.

    Args:
        threshold: Coordinates below this share of the largest count as small, in [0, 1]; 0 negates everything. The
            released code uses 0.03.
        strength: Factor of the subtracted part.

    Raises:
        ValueError: If ``threshold`` is out of range.

    Example:
        >>> merger = Ethos(threshold=0.1)
        >>> theta0 = {"w": torch.tensor([[3.0, 0.0], [0.0, 1.0]])}
        >>> merger.update({"w": torch.tensor([[20.0, 0.0], [0.5, 1.0]])}, statistics={"weights": theta0})
        >>> -merger.compute()["w"]
        tensor([[20.,  0.],
                [ 0.,  0.]])
    """

    name = "ethos"
    summary = "negate what is large in the base model's basis"
    source = "2403.08994"
    requires = frozenset({"weights"})
    slots = ("sum",)

    def __init__(
        self,
        threshold: float = 0.03,
        *,
        strength: float = 1.0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        split_qkv: bool = False,
    ) -> None:
        super().__init__(include=include, exclude=exclude, split_qkv=split_qkv)
        self.threshold = checked_share("threshold", threshold)
        self.strength = strength

    @override
    def _plan(self, vector: State, step: Step) -> State:
        super()._plan(vector, step)
        matrices = (name for name in vector if self._matrices.count(name, tuple(vector[name].shape)))
        return base_weights(step, vector, matrices)

    @override
    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: State) -> None:
        sums = self._matrices.pieces(name, slots["sum"])
        if not sums:
            return
        pieces = self._matrices.pieces(name, tau)
        bases = self._matrices.pieces(name, plan[name].detach().to(tau.device))
        for total, piece, weight in zip(sums, pieces, bases, strict=True):
            total.add_(self._large(piece.to(torch.float64), weight), alpha=step.sign)

    @override
    def _mass(self, vector: State, step: Step, plan: State) -> float:
        return vector_norm(vector)  # a projection can concentrate the whole norm in one entry

    def _large(self, tau: Tensor, weight: Tensor) -> Tensor:
        u, _, vh = live_svd(weight.to(torch.float64), weight.dtype)
        coordinates = u.t() @ tau @ vh.t()
        if not coordinates.numel():
            return tau
        small = coordinates.abs() < self.threshold * coordinates.abs().max()
        return tau - u @ (coordinates * small) @ vh

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        return slots["sum"] * -self.strength
