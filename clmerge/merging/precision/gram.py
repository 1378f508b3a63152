"""Base of the Gram rules: a matrix equation per weight matrix, from sums over the tasks."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots, device_of, float_dtype, slot_blocks
from clmerge.merging.checks import Shapes
from clmerge.merging.kept_beside import added
from clmerge.merging.orientation import IN_OUT, outputs_first
from clmerge.merging.removal import Removable, share_of
from clmerge.merging.step import Step

# What the solution of a nearly singular equation makes of an error in it, with the smallest ridge in use.
_AMPLIFIED = 1e8
_UNIT64 = 2.0**-53


class Gram(Removable):
    """Base of the rules with a Gram matrix ``G_t`` per weight matrix: least squares in the metric that it gives.

    A rule defines ``G_t``, shape (in, in), and ``W = sum(tau_t G_t) sum(G_t)^-1``, with a small ridge towards the mean,
    is the result; or it solves for another one. Other parameters are averaged. Kept are ``sum(G_t)`` and ``sum(tau_t
    G_t)`` of every matrix in float64, and ``sum(tau_t)`` of every parameter.

    Args:
        ridge: Pull towards the average, as a share of the Gram diagonal's mean, above 0.
        transposed: Patterns of matrices of shape (in, out). Default: CLIP's ``proj`` and ``text_projection``.
        scale: Scaling coefficient; 1 is the plain rule.

    Raises:
        ValueError: If ``ridge`` is not positive.
    """

    slots = ("sum",)

    def __init__(self, ridge: float = 1e-8, *, transposed: Sequence[str] = IN_OUT, scale: float = 1.0) -> None:
        super().__init__()
        if not ridge > 0:
            raise ValueError(f"expected ridge above 0, got {ridge}; Gram matrices are singular more often than not")
        self.ridge = ridge
        self.transposed = tuple(transposed)
        self.scale = scale
        self._grams: dict[str, Slots] = {}
        self._gram_error = 0.0  # bound on the relative error that removals have left in the Gram matrices
        self._keep("_grams", join=self._joined_grams)
        self._keep("_gram_error", join=max)

    @abstractmethod
    def _gram(self, name: str, tau: Tensor, plan: Any) -> Tensor | None:
        """Return the float64 Gram matrix of a parameter, shape (in, in), or None if it is merged without one."""

    def _solve(self, total: Tensor, held: Slots, dtype: torch.dtype) -> Tensor:
        """Return the merged matrix, (out, in), in float64, scale included.

        Args:
            total: ``sum(tau_t)``, float64.
            held: The matrix's accumulators of ``_accumulate``: ``gram``, ``sum(G_t)``, and ``moment``,
                ``sum(tau_t G_t)``.
            dtype: Dtype of the task vectors.
        """
        return ridge_solution(total / self.num_tasks, held["gram"], held["moment"], self.ridge) * self.scale

    def _read_other(self, total: Tensor) -> Tensor:
        """Return the merged value of a parameter without Gram matrix, from ``sum(tau_t)``."""
        return total * (self.scale / self.num_tasks)

    def _oriented(self, name: str, tensor: Tensor) -> Tensor:
        """Transpose a parameter that is stored as (in, out); return others unchanged."""
        return outputs_first(name, tensor, self.transposed)

    @override
    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        for block, (piece,) in slot_blocks(slots, tau):
            block["sum"].add_(piece.to(block["sum"].dtype), alpha=step.sign)
        matrix = self._oriented(name, tau).double() if tau.ndim == 2 else tau
        gram = self._gram(name, matrix, plan)
        if gram is None:
            return
        self._accumulate(self._grams.setdefault(name, {}), name, matrix, gram.to(device_of(slots)), step)

    def _accumulate(self, held: Slots, name: str, matrix: Tensor, gram: Tensor, step: Step) -> None:
        """Fold a matrix and its Gram matrix, both float64, into the parameter's accumulators, empty at first."""
        if not held:
            held |= {"gram": torch.zeros_like(gram), "moment": torch.zeros_like(matrix)}
        held["gram"].add_(gram, alpha=step.sign)
        held["moment"].addmm_(matrix, gram, alpha=step.sign)

    @override
    def _read(self, name: str, slots: Slots, overview: Any) -> Tensor:
        if name not in self._grams or not slots["sum"].numel():
            return self._read_other(slots["sum"])
        total, held = self._oriented(name, slots["sum"]).double(), self._grams[name]
        merged = self._solve(total, held, float_dtype(slots))
        return self._oriented(name, merged).to(float_dtype(slots)).contiguous()

    def _joined_grams(self, ours: dict[str, Slots], theirs: dict[str, Slots]) -> dict[str, Slots]:
        """Return the joined Gram accumulators of two mergers."""
        joined: dict[str, Slots] = added(ours, theirs)
        return joined

    @override
    def _uncertain(self, before: dict[str, Slots], extras: dict[str, Any], plan: Any) -> float:
        shrunk = 1.0
        for name, held in self._grams.items():
            old, rest = (float(grams["gram"].diagonal().sum()) for grams in (extras["grams"][name], held))
            shrunk = max(shrunk, share_of(old, rest))
        self._gram_error = shrunk * (self._gram_error + 2 * _UNIT64 * self.num_tasks)
        # The moments hold the task vectors times Gram matrices, and lose as much as these and the sum together.
        return super()._uncertain(before, extras, plan) + share_of(
            _AMPLIFIED * self._gram_error * extras["rounding"]["mass"], self._rounding["mass"]
        )

    @override
    def _clear(self) -> None:
        super()._clear()
        self._grams = {}

    @override
    def state_size(self, shapes: Shapes, num_tasks: int) -> int:
        """Return the bytes of the accumulators, including float64 Gram matrices and moments.

        Args:
            shapes: Shapes of the merged parameters by name.
            num_tasks: Number of merged task vectors.
        """
        matrices = [self._oriented_shape(name, shape) for name, shape in shapes.items() if self._has_gram(name, shape)]
        return super().state_size(shapes, num_tasks) + sum(self._gram_size(*shape, num_tasks) for shape in matrices)

    def _has_gram(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether a parameter has a Gram matrix; before the first task, whether it can have one."""
        return name in self._grams if self._shapes else len(shape) == 2 and min(shape) > 0

    def _oriented_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
        outputs, inputs = self._oriented(name, torch.empty(shape, device="meta")).shape
        return outputs, inputs

    def _gram_size(self, outputs: int, inputs: int, num_tasks: int) -> int:
        return 8 * inputs * (inputs + outputs)


def ridge_solution(start: Tensor, gram: Tensor, moment: Tensor, ridge: float) -> Tensor:
    """Solve ``W gram = moment`` for W with a ridge penalty on the distance from ``start``.

    The minimiser of ``tr(W gram W^T) / 2 - tr(W moment^T) + r / 2 |W - start|^2`` is ``start + (moment - start gram)
    (gram + r I)^-1``: directions in the null space of the Gram matrix keep ``start``.

    Args:
        start: Shape (out, in), float64.
        gram: Symmetric positive semi-definite, shape (in, in), float64.
        moment: Shape (out, in), float64.
        ridge: ``r`` as a share of the mean of the Gram matrix's diagonal, above 0.

    Returns:
        Shape (out, in).

    Example:
        >>> start, gram = torch.tensor([[1.0, 1.0]]).double(), torch.tensor([[2.0, 0.0], [0.0, 0.0]]).double()
        >>> ridge_solution(start, gram, torch.tensor([[6.0, 0.0]]).double(), ridge=1e-9).round(decimals=3)
        tensor([[3., 1.]], dtype=torch.float64)
    """
    mean = float(gram.diagonal().mean())
    if mean <= torch.finfo(torch.float64).tiny:
        return start
    penalised = gram + ridge * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    correction: Tensor = torch.linalg.solve(penalised, moment - start @ gram, left=False)
    return start + correction
