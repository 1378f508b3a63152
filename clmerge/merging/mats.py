"""MaTS: conjugate gradients from a given merge towards all tasks, in the metric of their layers' inputs."""

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from clmerge.merging.gram import IN_OUT
from clmerge.merging.regmean import RegMean

_SOLVED = 1e-28  # squared residual, as a share of that of zero: float64 does not get further


class MaTS(RegMean):
    """Match the tasks in their parameter subspaces by conjugate gradients (Tam et al., arXiv 2312.04339).

    Solves ``W sum(G_t) = sum(W_t G_t)`` for matrices that come with the Gram matrix ``G_t`` of their inputs, by steps
    of conjugate gradients from task arithmetic or the mean. The start stays in directions that no task's inputs
    have, and a few steps change mostly the directions with the largest inputs; many end at RegMean with
    ``reduce`` 1. Parameters without a Gram matrix stay as they start. State: as for RegMean.

    This is the paper's method with the covariance of the inputs. With both Kronecker factors of the Fisher
    information (the outputs' gradients as well) the factors of all tasks would have to be kept, and are not used.

    Args:
        steps: Most iterations; they end earlier once the equation is solved. The paper tunes their number.
        start: Coefficient of the sum of the task vectors where the iteration starts. Default: 1 / T, the mean.
        transposed: Patterns of matrices of shape (in, out). Default: CLIP's ``proj`` and ``text_projection``.

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

    def __init__(self, steps: int = 100, *, start: float | None = None, transposed: Sequence[str] = IN_OUT) -> None:
        super().__init__(reduce=1.0, transposed=transposed)
        if steps < 1:
            raise ValueError(f"expected at least 1 step, got {steps}")
        self.steps = steps
        self.start = start

    @override
    def _solve(self, total: Tensor, gram: Tensor, moment: Tensor) -> Tensor:
        return conjugate_gradients(self._read_other(total), gram, moment, self.steps)

    @override
    def _read_other(self, total: Tensor) -> Tensor:
        return total * (1 / self.num_tasks if self.start is None else self.start)


def conjugate_gradients(start: Tensor, gram: Tensor, moment: Tensor, steps: int) -> Tensor:
    """Take steps of conjugate gradients towards the solution of ``W gram = moment``.

    Args:
        start: Shape (out, in), float64.
        gram: Symmetric positive semi-definite, shape (in, in), float64.
        moment: Shape (out, in), float64.
        steps: Most iterations.

    Returns:
        Shape (out, in), fresh.

    Example:
        >>> import torch
        >>> gram, moment = torch.diag(torch.tensor([1.0, 2.0])).double(), torch.tensor([[1.0, 1.0]]).double()
        >>> conjugate_gradients(torch.zeros(1, 2).double(), gram, moment, steps=2)
        tensor([[1.0000, 0.5000]], dtype=torch.float64)
    """
    weights = start.clone()
    residual = moment - weights @ gram
    direction = residual.clone()
    squared = float(residual.square().sum())
    # The start may solve the equation already; what then remains is rounding of its two sides.
    solved = _SOLVED * float(moment.square().sum())
    for _ in range(steps):
        if squared <= solved:
            break
        image = direction @ gram
        curvature = float((direction * image).sum())
        if curvature <= 0:
            break
        length = squared / curvature
        weights.add_(direction, alpha=length)
        residual.sub_(image, alpha=length)
        before, squared = squared, float(residual.square().sum())
        direction.mul_(squared / before).add_(residual)
    return weights
