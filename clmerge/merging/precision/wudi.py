"""WUDI and ACTMat: Gram rules that use the task vectors in place of the layer inputs."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.checks import checked_choice, checked_steps
from clmerge.merging.orientation import IN_OUT
from clmerge.merging.precision.gram import Gram, ridge_solution

Solver = Literal["adam", "ridge"]
Others = Literal["mean", "keep"]


class WUDI(Gram):
    """Minimise the interference in the subspaces that the task vectors span (arXiv 2503.08099).

    For every matrix, the objective is ``sum(|(M - tau_t) tau_t^T|^2 / |tau_t|^2)``: the rows of a task vector lie
    in the span of its layer's inputs, so no data is needed. Gradient and minimiser depend on the tasks only through
    ``sum(G_t)`` and ``sum(tau_t G_t)`` with ``G_t = tau_t^T tau_t / |tau_t|^2``, so the stream is exact. State:
    4 bytes per parameter, 8 more per entry of a matrix and 8 in^2 for it, in float64.

    The paper starts at ``sum(tau_t)`` and stops Adam after 300 short steps; its reported results are for this point
    near the sum. The minimiser itself can be far from it.
    ``compute()`` then takes 300 products with the Gram matrix, 78 TFLOP for the image tower of a ViT-B. They are
    computed in float32 (float64 for float64 vectors), on the distance from the start, which is exact where that is
    zero.

    Args:
        solver: ``"adam"`` is the paper's rule; ``"ridge"`` is the minimiser in closed form, regularised to the sum.
        steps: Steps of Adam.
        lr: Learning rate of Adam; the length of a step does not depend on the size of the task vectors.
        ridge: Regularisation of the closed form to the sum, as a share of the mean of the Gram diagonal, above 0.
        others: Parameters that are not matrices: ``"mean"`` averages them, as in FusionBench; ``"keep"`` keeps the
            base model's, as in the official script, which merges only the four matrices of each block.
        scale: Scaling coefficient; 1 is the paper's rule.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> import torch
        >>> merger = WUDI(solver="ridge")
        >>> merger.update({"w": torch.tensor([[2.0, 0.0]])})
        >>> merger.update({"w": torch.tensor([[0.0, 3.0]])})  # no interference: the sum
        >>> merger.compute()
        {'w': tensor([[2., 3.]])}
    """

    name = "wudi"
    summary = "least interference in the span of the task vectors"
    source = "2503.08099"

    def __init__(
        self,
        solver: Solver = "adam",
        *,
        steps: int = 300,
        lr: float = 1e-5,
        ridge: float = 1e-8,
        others: Others = "mean",
        transposed: Sequence[str] = IN_OUT,
        scale: float = 1.0,
    ) -> None:
        super().__init__(ridge, transposed=transposed, scale=scale)
        if not lr > 0:
            raise ValueError(f"expected lr above 0, got {lr}")
        self.solver = checked_choice("solver", solver, Solver)
        self.steps = checked_steps(steps)
        self.lr = lr
        self.others = checked_choice("others", others, Others)

    @override
    def _gram(self, name: str, tau: Tensor, plan: Any) -> Tensor | None:
        return _outer(tau, normalize=True) if tau.ndim == 2 else None

    @override
    def _solve(self, total: Tensor, held: Slots, dtype: torch.dtype) -> Tensor:
        if self.solver == "ridge":
            return ridge_solution(total, held["gram"], held["moment"], self.ridge) * self.scale
        gram, moment = held["gram"], held["moment"]
        return interference_descent(total, gram, moment, steps=self.steps, lr=self.lr, dtype=dtype) * self.scale

    @override
    def _read_other(self, total: Tensor) -> Tensor:
        return total * (self.scale / self.num_tasks if self.others == "mean" else 0.0)


def interference_descent(
    start: Tensor, gram: Tensor, moment: Tensor, *, steps: int, lr: float, dtype: torch.dtype
) -> Tensor:
    """Minimise ``tr(W gram W^T) - 2 tr(W moment^T)`` with steps of Adam from ``start``.

    Adam divides by the size of the gradient, so the rounding error of a zero gradient would become a full step.
    Therefore the distance from the start is iterated: the gradient at the start is computed in float64, and rounding
    errors of later gradients are relative to the distance.

    Args:
        start: Shape (out, in), float64.
        gram: Symmetric, shape (in, in), float64.
        moment: Shape (out, in), float64.
        steps: Number of steps.
        lr: Learning rate.
        dtype: Dtype of the distance; float32 is twice as fast as float64 on a CPU, and more on a GPU.

    Returns:
        Shape (out, in), float64.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> interference_descent(0 * one, one, one, steps=3, lr=0.1, dtype=torch.float32).round(decimals=2)
        tensor([[0.3000]], dtype=torch.float64)
    """
    at_start = (2 * (start @ gram - moment)).to(dtype)
    gram = gram.to(dtype)
    distance = torch.zeros_like(at_start)
    distance.grad = torch.empty_like(distance)
    fused = distance.device.type in ("cpu", "cuda")  # one pass over the memory instead of ten
    optimizer = torch.optim.Adam([distance], lr=lr, fused=fused)
    for _ in range(steps):
        torch.addmm(at_start, distance, gram, alpha=2, out=distance.grad)
        optimizer.step()
    return start + distance


class ACTMat(Gram):
    """RegMean without data: ``tau_t^T tau_t`` replaces the Gram matrix of the inputs (arXiv 2604.01329).

    ``W = sum(tau_t G_t) sum(G_t)^-1`` for matrices; other parameters are averaged. Larger task vectors weigh more;
    WUDI with ``solver="ridge"`` is the same with Gram matrices of trace 1. State: as for WUDI.

    Rows of nearly one direction that differ between tasks, as in the query of a latent token, are all reproduced, at
    the price of huge entries elsewhere: with ``ridge`` 1e-8 a merged matrix had 2e4 times the norm of its task
    vectors, with 0.01 nine times (docs/methods.md, Caltech). Choose it on validation images.

    Example:
        >>> import torch
        >>> merger = ACTMat()
        >>> merger.update({"w": torch.tensor([[1.0]])})
        >>> merger.update({"w": torch.tensor([[3.0]])})
        >>> merger.compute()  # (1 + 27) / (1 + 9)
        {'w': tensor([[2.8000]])}
    """

    name = "actmat"
    summary = "RegMean with the task vectors' own Gram matrices for those of the inputs"
    source = "2604.01329"

    @override
    def _gram(self, name: str, tau: Tensor, plan: Any) -> Tensor | None:
        return _outer(tau, normalize=False) if tau.ndim == 2 else None


def _outer(tau: Tensor, normalize: bool) -> Tensor:
    gram = tau.t() @ tau
    squared_norm = float(gram.trace())
    return gram / squared_norm if normalize and squared_norm else gram
