"""WUDI and ACTMat: the task vectors themselves stand in for the inputs of the layers."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.gram import IN_OUT, _Gram, ridge_solution


class WUDI(_Gram):
    """Minimise the interference in the subspaces that the task vectors span (arXiv 2503.08099).

    For every matrix, the minimiser of ``sum(|(M - tau_t) tau_t^T|^2 / |tau_t|^2)``: the rows of a task vector lie
    in the span of its layer's inputs, so it takes no data. Gradient and minimiser depend on the tasks through
    ``sum(G_t)`` and ``sum(tau_t G_t)`` with ``G_t = tau_t^T tau_t / |tau_t|^2`` alone, so the stream is exact. State:
    4 bytes per parameter, 8 more per entry of a matrix and 8 in^2 for it, in float64.

    The paper starts at ``sum(tau_t)`` and stops Adam after 300 short steps, a result near the sum; its figures are
    for that. The minimiser itself can be far from it.
    ``compute()`` then takes 300 products with the Gram matrix: about 80 TFLOP in float64 for a ViT-B, seconds on a
    large GPU but tens of minutes on a few CPU cores.

    Args:
        solver: ``"adam"`` is the paper's rule; ``"ridge"`` is the minimiser in closed form, pulled to the sum.
        steps: Steps of Adam.
        lr: Learning rate of Adam. Its steps are that long whatever the size of the task vectors.
        ridge: Pull of the closed form towards the sum, as a share of the mean of the Gram diagonal, above 0.
        others: What becomes of parameters that are no matrices: ``"mean"``, as in FusionBench, or ``"keep"``, the
            base model's as in the official script, which merges the blocks' four matrices alone.
        transposed: Patterns of matrices of shape (in, out). Default: CLIP's ``proj`` and ``text_projection``.
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
        solver: Literal["adam", "ridge"] = "adam",
        *,
        steps: int = 300,
        lr: float = 1e-5,
        ridge: float = 1e-8,
        others: Literal["mean", "keep"] = "mean",
        transposed: Sequence[str] = IN_OUT,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if solver not in ("adam", "ridge"):
            raise ValueError(f"expected solver 'adam' or 'ridge', got {solver!r}")
        if others not in ("mean", "keep"):
            raise ValueError(f"expected others 'mean' or 'keep', got {others!r}")
        if not (steps > 0 and lr > 0 and ridge > 0):
            raise ValueError(f"expected steps, lr and ridge above 0, got {steps}, {lr} and {ridge}")
        self.solver = solver
        self.steps = steps
        self.lr = lr
        self.ridge = ridge
        self.others = others
        self.transposed = tuple(transposed)
        self.scale = scale

    @override
    def _gram(self, name: str, tau: Tensor, plan: Any) -> Tensor | None:
        return _outer(tau, normalize=True) if tau.ndim == 2 else None

    @override
    def _solve(self, total: Tensor, gram: Tensor, moment: Tensor) -> Tensor:
        if self.solver == "ridge":
            return ridge_solution(total, gram, moment, self.ridge) * self.scale
        # In float64: Adam divides by the size of the gradient, so rounding of a gradient that is 0 is a full step.
        merged = total.clone()
        optimizer = torch.optim.Adam([merged], lr=self.lr)
        for _ in range(self.steps):
            merged.grad = 2 * (merged @ gram - moment)
            optimizer.step()
        return merged.detach() * self.scale

    @override
    def _read_other(self, total: Tensor) -> Tensor:
        return total * (self.scale / self.num_tasks if self.others == "mean" else 0.0)


class ACTMat(_Gram):
    """RegMean with ``tau_t^T tau_t`` for the Gram matrix of the inputs, so without data (arXiv 2604.01329).

    ``W = sum(tau_t G_t) sum(G_t)^-1`` for matrices; other parameters are averaged. Larger task vectors weigh more;
    WUDI with ``solver="ridge"`` is the same with Gram matrices of trace 1. State: as for WUDI.

    Args:
        ridge: Pull towards the average, as a share of the Gram diagonal's mean, above 0.
        transposed: Patterns of matrices of shape (in, out). Default: CLIP's ``proj`` and ``text_projection``.
        scale: Scaling coefficient; 1 is the paper's rule.

    Raises:
        ValueError: If ``ridge`` is not positive.

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

    def __init__(self, ridge: float = 1e-8, *, transposed: Sequence[str] = IN_OUT, scale: float = 1.0) -> None:
        super().__init__()
        if not ridge > 0:
            raise ValueError(f"expected ridge above 0, got {ridge}; Gram matrices of task vectors are singular")
        self.ridge = ridge
        self.transposed = tuple(transposed)
        self.scale = scale

    @override
    def _gram(self, name: str, tau: Tensor, plan: Any) -> Tensor | None:
        return _outer(tau, normalize=False) if tau.ndim == 2 else None

    @override
    def _solve(self, total: Tensor, gram: Tensor, moment: Tensor) -> Tensor:
        return ridge_solution(total / self.num_tasks, gram, moment, self.ridge) * self.scale

    @override
    def _read_other(self, total: Tensor) -> Tensor:
        return total * (self.scale / self.num_tasks)


def _outer(tau: Tensor, normalize: bool) -> Tensor:
    gram = tau.t() @ tau
    squared_norm = float(gram.trace())
    return gram / squared_norm if normalize and squared_norm else gram
