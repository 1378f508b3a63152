"""AdaRank: which singular values of every task matrix to keep, learned after every task."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.checks import checked_share
from clmerge.merging.learned.learned import Learned, Moment, Taus, weighted
from clmerge.merging.matrices import Matrices
from clmerge.merging.objectives import Entropy, Objective

_WIDTH = 10.0  # of the sigmoid through which the gradient of a kept or dropped singular value goes
_MARGIN = 0.1


class AdaRank(Learned):
    """Learn which singular values of every task matrix to keep (Lee et al., arXiv 2503.22178).

    A singular value is kept where ``sigmoid(x / 10) > 0.5``, and the gradient goes through the sigmoid. x starts at 0.1
    for those that are kept and at -0.1 for the others, so that with the default learning rate it takes a hundred steps
    to change one. A coefficient per task and parameter tensor is learned as well. The paper takes 10,000 steps on test
    images and keeps the best of them by test accuracy; here the number of steps is fixed, on the declared adaptation
    data.

    The decompositions of all tasks are held while it learns, about as much memory again as the task vectors.

    Args:
        scale: Start of the coefficients; the paper's is 0.3, and 2.3 with ``centred`` for eight tasks.
        centred: Take the task vectors from their mean instead of from theta_0 (the paper's CART).
        rank_ratio: Share of the singular values that is kept at the start; the paper's is 1, and 0.16 with ``centred``.
        steps: Optimizer steps after every task.
        lr: Learning rate of Adam.
        include: Glob patterns of the parameters that are decomposed, if they have two dimensions.
        objective: What is minimised. Default: ``Entropy()`` over the classes of each image's task.
        seed: Seed of the order of the images.

    Raises:
        ValueError: If a setting is out of range.
    """

    name = "adarank"
    summary = "sum of the task vectors with the singular values that are learned to be kept"
    source = "2503.22178"

    def __init__(
        self,
        scale: float = 0.3,
        *,
        centred: bool = False,
        rank_ratio: float = 1.0,
        steps: int = 500,
        lr: float = 1e-3,
        include: Sequence[str] = ("*attn*", "*mlp*"),
        objective: Objective | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(objective=objective or Entropy(), steps=steps, lr=lr, seed=seed)
        self.scale = scale
        self.centred = centred
        self.rank_ratio = checked_share("rank_ratio", rank_ratio)
        self.include = list(include)
        self.objective = objective
        self._matrices = Matrices(self.include)

    @override
    def _start(self, name: str, shape: tuple[int, ...], num_tasks: int) -> dict[str, Tensor]:
        found = {f"scale {name}": torch.full((num_tasks,), self.scale, dtype=torch.float64)}
        if self._matrices.pieces(name, torch.empty(shape, device="meta")):
            rank = min(shape)
            row = torch.full((rank,), -_MARGIN, dtype=torch.float64)
            row[: round(self.rank_ratio * rank)] = _MARGIN
            found[f"mask {name}"] = row.repeat(num_tasks, 1)
        return found

    @override
    def _survey(self, names: list[str], taus: Taus) -> dict[str, list[tuple[Tensor, Tensor, Tensor]]]:
        """Return an empty cache of decompositions."""
        return {}

    @override
    def _combine(self, name: str, taus: list[Tensor], coefficients: Mapping[str, Tensor], moment: Moment) -> Tensor:
        centre = torch.stack(taus).mean(dim=0) if self.centred else torch.zeros_like(taus[0])
        scales = coefficients[f"scale {name}"]
        if (x := coefficients.get(f"mask {name}")) is None:
            return centre + weighted([tau - centre for tau in taus], scales)
        moved = [tau - centre for tau in taus]
        kept = straight_through(x).to(centre)
        if moment.step is None:  # nothing is decomposed for a task that keeps all
            parts = [tau if bool(row.all()) else _kept(_svd(tau), row) for tau, row in zip(moved, kept, strict=True)]
            return centre + weighted(parts, scales)
        if name not in moment.survey:
            moment.survey[name] = [_svd(tau) for tau in moved]
        factors = moment.survey[name]
        return centre + weighted([_kept(factor, row) for factor, row in zip(factors, kept, strict=True)], scales)


@torch.no_grad()
def _svd(tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(tau.to(torch.float64), full_matrices=False)
    return u.to(tau), s.to(tau), vh.to(tau)


def _kept(factors: tuple[Tensor, Tensor, Tensor], row: Tensor) -> Tensor:
    """Return the matrix with its singular values times a row of the mask."""
    u, s, vh = factors
    return (u * (s * row)) @ vh


def straight_through(x: Tensor) -> Tensor:
    """Return 1 where ``sigmoid(x / 10) > 0.5`` and 0 elsewhere, with the derivative of the sigmoid.

    Example:
        >>> straight_through(torch.tensor([0.1, -0.1]))
        tensor([1., 0.])
    """
    soft = torch.sigmoid(x / _WIDTH)
    return (soft > 0.5).to(soft) + (soft - soft.detach())
