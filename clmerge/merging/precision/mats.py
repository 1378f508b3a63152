"""MaTS: conjugate gradients from an initial merge towards all tasks, in the metric of layer inputs and outputs."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.checks import checked_steps
from clmerge.merging.orientation import IN_OUT
from clmerge.merging.precision.regmean import RegMean
from clmerge.merging.required import tensors_of
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State

_SOLVED = 1e-28  # squared residual relative to that of W = 0; float64 cannot go lower


class MaTS(RegMean):
    """Match the tasks in their parameter subspaces by conjugate gradients (Tam et al., arXiv 2312.04339).

    For matrices that come with the Gram matrix ``A_t`` of their inputs, takes steps of conjugate gradients from task
    arithmetic or the mean towards the solution of

    - ``W sum(A_t) = sum(W_t A_t)``, the paper's method with the covariance of the inputs;
    - ``sum(B_t W A_t) = sum(B_t W_t A_t)`` with ``outputs``: both Kronecker factors of the Fisher information, ``B_t``
      those of the gradients of the outputs (``clmerge.statistics.output_factors``).

    Directions without inputs in any task keep the start, and a few steps mainly change the directions with the
    largest inputs; without ``outputs``, many steps converge to RegMean with ``reduce`` 1. Parameters without a Gram
    matrix keep the start.

    State: as for RegMean. With ``outputs`` the factors of all tasks are kept, ``8 (in^2 + out^2)`` bytes per matrix and
    task, but no task vectors; a step takes two products per task and matrix, and no task can be removed.

    Args:
        steps: Maximum number of iterations; they end earlier once the equation is solved. The paper tunes it.
        start: The iteration starts at this coefficient times the sum of the task vectors. Default: 1 / T, the mean.
        outputs: Whether the statistic ``"output_gram"`` is used in addition to ``"gram"``.

    Raises:
        ValueError: If ``steps`` is below 1.

    Example:
        >>> import torch
        >>> merger = MaTS()
        >>> one, other = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> merger.update({"w": torch.tensor([[4.0, 4.0]])}, statistics={"gram": {"w": one}})
        >>> merger.update({"w": torch.tensor([[0.0, 0.0]])}, statistics={"gram": {"w": other}})
        >>> merger.compute()
        {'w': tensor([[3., 2.]])}
    """

    name = "mats"
    summary = "conjugate gradients from the mean towards RegMean's solution"
    source = "2312.04339"

    def __init__(
        self,
        steps: int = 100,
        *,
        start: float | None = None,
        outputs: bool = False,
        transposed: Sequence[str] = IN_OUT,
    ) -> None:
        super().__init__(reduce=1.0, transposed=transposed)
        self.steps = checked_steps(steps)
        self.start = start
        self.outputs = outputs
        if outputs:
            self.requires = frozenset({"gram", "output_gram"})
            self.exact_online = self.removable = False

    @override
    def _plan(self, vector: State, step: Step) -> State:
        grams = super()._plan(vector, step)
        factors = tensors_of(step, "output_gram") if self.outputs else {}
        for name in grams if self.outputs else ():
            size = self._oriented(name, vector[name]).shape[0]
            found = tuple(factors[name].shape) if name in factors else "none"
            if found != (size, size):
                raise ValueError(
                    f"expected an output_gram of shape {(size, size)} for {name!r} of task {step.task}, which has a "
                    f"Gram matrix, got {found}; collect both for the same parameters"
                )
        return grams

    @override
    def _accumulate(self, held: Slots, name: str, matrix: Tensor, gram: Tensor, step: Step) -> None:
        if not self.outputs:
            super()._accumulate(held, name, matrix, gram, step)
            return
        outputs = tensors_of(step, "output_gram")[name].detach().to(gram.device, torch.float64, copy=True)
        _append(held, gram.clone(), outputs)
        moment = outputs @ matrix @ gram
        held["moment"] = held["moment"] + moment if "moment" in held else moment

    @override
    def _joined_grams(self, ours: dict[str, Slots], theirs: dict[str, Slots]) -> dict[str, Slots]:
        if not self.outputs:
            return super()._joined_grams(ours, theirs)
        for name, held in ours.items():
            others = {key: tensor.to(held["moment"].device) for key, tensor in theirs[name].items()}
            for inputs, outputs in _pairs(others):
                _append(held, inputs.clone(), outputs.clone())
            held["moment"] = held["moment"] + others["moment"]
        return ours

    @override
    def _gram_size(self, outputs: int, inputs: int, num_tasks: int) -> int:
        if not self.outputs:
            return super()._gram_size(outputs, inputs, num_tasks)
        return 8 * (outputs * inputs + num_tasks * (inputs**2 + outputs**2))

    @override
    def _solve(self, total: Tensor, held: Slots, dtype: torch.dtype) -> Tensor:
        def apply(weights: Tensor) -> Tensor:
            if not self.outputs:
                return weights @ held["gram"]
            return torch.stack([outputs @ weights @ inputs for inputs, outputs in _pairs(held)]).sum(dim=0)

        return conjugate_gradients(self._read_other(total), apply, held["moment"], self.steps)

    @override
    def _read_other(self, total: Tensor) -> Tensor:
        return total * (1 / self.num_tasks if self.start is None else self.start)


def _pairs(held: Slots) -> list[tuple[Tensor, Tensor]]:
    """Return the Kronecker factors of every task as pairs: of the inputs, and of the outputs."""
    count = sum(key.startswith("inputs") for key in held)
    return [(held[f"inputs{position}"], held[f"outputs{position}"]) for position in range(count)]


def _append(held: Slots, inputs: Tensor, outputs: Tensor) -> None:
    position = len(_pairs(held))
    held[f"inputs{position}"], held[f"outputs{position}"] = inputs, outputs


def conjugate_gradients(start: Tensor, apply: Callable[[Tensor], Tensor], moment: Tensor, steps: int) -> Tensor:
    """Take steps of conjugate gradients towards the solution of ``apply(W) = moment``.

    Args:
        start: Shape (out, in), float64.
        apply: Linear, symmetric and positive semi-definite, from matrices (out, in) to such matrices.
        moment: Shape (out, in), float64.
        steps: Maximum number of iterations.

    Returns:
        A new tensor of shape (out, in).

    Example:
        >>> gram, moment = torch.diag(torch.tensor([1.0, 2.0])).double(), torch.tensor([[1.0, 1.0]]).double()
        >>> conjugate_gradients(torch.zeros(1, 2).double(), lambda weights: weights @ gram, moment, steps=2)
        tensor([[1.0000, 0.5000]], dtype=torch.float64)
    """
    weights = start.clone()
    residual = moment - apply(weights)
    direction = residual.clone()
    squared = float(residual.square().sum())
    # If the start already solves the equation, the residual is the rounding error of its two sides.
    solved = _SOLVED * float(moment.square().sum())
    for _ in range(steps):
        if squared <= solved:
            break
        image = apply(direction)
        curvature = float((direction * image).sum())
        if curvature <= 0:
            break
        length = squared / curvature
        weights.add_(direction, alpha=length)
        residual.sub_(image, alpha=length)
        before, squared = squared, float(residual.square().sum())
        direction.mul_(squared / before).add_(residual)
    return weights
