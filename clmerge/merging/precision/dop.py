"""DOP: optimise the merged matrix against losses that preserve the old and the new model's inputs and outputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.checks import checked_share, checked_steps
from clmerge.merging.spectral.decomposition import Spectral
from clmerge.merging.step import Step


class DOP(Spectral):
    """Merge continually by dual orthogonal projection (DOP, Yang et al., NeurIPS 2025; OpenReview zD5cUX67b9).

    The singular vectors of the merged matrix M so far and of a new task matrix tau approximate the inputs and outputs
    they were trained on: with ``Y = U S V^T`` the decomposition of either, its loss at X is ``|S U^T (X - Y)|^2 +
    |(X - Y) V S|^2``. Starting at the mean of the two, X takes ``num_steps`` steps of Adam on ``a loss(M) + (1 - a)
    loss(tau)`` and becomes the new M. ``a`` begins at ``alpha`` and is a moving average of the weights that minimise
    the norm of the weighted sum of loss-normalised gradients (multiple-gradient descent). Parameters that are not
    matrices become the mean of merged and new, as in the released code, whose defaults are used. In that code only
    weights of linear layers count as matrices.

    ``energy`` has the meaning of the released code: leading singular values are used while their sum stays below that
    share; the one that crosses it is left out. The steps have a fixed length, so scaling all task vectors does not
    scale the result. State: 4 bytes per parameter. An update costs two decompositions and ``num_steps`` gradients per
    matrix, in float64. The order of the tasks matters.

    Args:
        num_steps: Steps of Adam per task.
        lr: Length of a step, in units of the weights.
        alpha: Weight of the merged model at first, in [0, 1].
        beta: Decay of the moving average of the weights, in [0, 1]; 1 keeps ``alpha``.
        energy: Share of the sum of singular values that is used, in [0, 1].

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> merger = DOP(num_steps=0)
        >>> merger.update({"w": torch.tensor([[2.0, 0.0]])})
        >>> merger.update({"w": torch.tensor([[0.0, 4.0]])})
        >>> merger.compute()
        {'w': tensor([[1., 2.]])}
    """

    name = "dop"
    summary = "optimise the merged matrix in the spaces of old and new model"
    order_free = False
    slots = ("merged",)

    def __init__(
        self,
        num_steps: int = 200,
        *,
        lr: float = 1e-4,
        alpha: float = 0.8,
        beta: float = 0.999,
        energy: float = 0.99999,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        split_qkv: bool = False,
    ) -> None:
        super().__init__(include=include, exclude=exclude, split_qkv=split_qkv)
        if lr <= 0:
            raise ValueError(f"expected lr above 0, got {lr}")
        self.num_steps = checked_steps(num_steps, 0, name="num_steps")
        self.lr = lr
        self.alpha = checked_share("alpha", alpha)
        self.beta = checked_share("beta", beta)
        self.energy = checked_share("energy", energy)

    @override
    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        merged = slots["merged"]
        matrices = self._matrices.pieces(name, merged)
        if not step.position:
            merged.copy_(tau)
        elif not matrices:
            merged.add_(tau).div_(2)
        else:
            for matrix, piece in zip(matrices, self._matrices.pieces(name, tau), strict=True):
                matrix.copy_(self._optimised([matrix.double(), piece.to(torch.float64).contiguous()]))

    def _optimised(self, models: list[Tensor]) -> Tensor:
        """Return the matrix between the merged and the new one, all of shape ``(m, n)``, float64."""
        spaces = [_scaled_spaces(model, self.energy) for model in models]
        x = (models[0] + models[1]) / 2
        weight = self.alpha
        optimizer = torch.optim.Adam([x], lr=self.lr, fused=x.device.type in ("cpu", "cuda"))
        for _ in range(self.num_steps):
            losses, gradients = zip(
                *(_loss(x - model, *space) for model, space in zip(models, spaces, strict=True)), strict=True
            )
            normalised = [
                gradient / loss if loss > 0 else gradient for loss, gradient in zip(losses, gradients, strict=True)
            ]
            weight = self.beta * weight + (1 - self.beta) * shortest(*normalised)
            x.grad = weight * gradients[0] + (1 - weight) * gradients[1]
            optimizer.step()
        return x

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        return slots["merged"].clone()


def shortest(first: Tensor, second: Tensor) -> float:
    """Return the weight of the first of two gradients in their shortest convex combination.

    Args:
        first: Any shape.
        second: Same shape.

    Returns:
        A number in [0.001, 0.999]: as in the released solver, neither gradient is left out.

    Example:
        >>> shortest(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
        0.8
    """
    squares = float(first.square().sum()), float(second.square().sum())
    both = float((first * second).sum())
    if both >= squares[0]:
        return 0.999
    if both >= squares[1]:
        return 0.001
    return (squares[1] - both) / (squares[0] + squares[1] - 2 * both)


def _scaled_spaces(model: Tensor, energy: float) -> tuple[Tensor, Tensor]:
    """Return ``U S`` of shape ``(m, k)`` and ``V S`` of shape ``(n, k)``."""
    u, s, vh = torch.linalg.svd(model, full_matrices=False)
    rank = int((s.cumsum(0) < energy * s.sum()).sum())
    return u[:, :rank] * s[:rank], vh[:rank].t() * s[:rank]


def _loss(difference: Tensor, left: Tensor, right: Tensor) -> tuple[float, Tensor]:
    """Return one model's loss and its gradient."""
    outputs, inputs = left.t() @ difference, difference @ right
    loss = float(outputs.square().sum() + inputs.square().sum())
    return loss, 2 * (left @ outputs + inputs @ right.t())
