"""Breadcrumbs: drop the largest and the smallest entries of every tensor, then add."""

from itertools import islice

from torch import Tensor
from typing_extensions import override

from clmerge.merging.blocks import entries_at_once
from clmerge.merging.linear.arithmetic import TaskArithmetic
from clmerge.merging.pipeline import Pipeline
from clmerge.merging.sparsify.sparsifier import Sparsifier, keep_largest
from clmerge.merging.threshold import Threshold, kth_largest_magnitude, kth_largest_of_each
from clmerge.weights.task_vector import State


class BreadcrumbsMask(Sparsifier):
    """Keep the middle magnitudes of every tensor (arXiv 2312.06795).

    Of a tensor's n entries the ``int(gamma * n)`` largest and the ``int(beta * n)`` smallest become zero. Both numbers
    are rounded down and their shares add up to less than 1, so every tensor keeps at least one entry, even a small
    tensor without outliers. Between entries of equal magnitude the later in memory order count as smaller.

    Args:
        beta: Share of the entries of smallest magnitude that is dropped, in [0, 1).
        gamma: Share of the entries of largest magnitude that is dropped, in [0, 1); ``beta + gamma < 1``.

    Example:
        >>> import torch
        >>> BreadcrumbsMask(beta=0.5, gamma=0.25)({"w": torch.tensor([1.0, -4.0, 3.0, 2.0])})
        {'w': tensor([0., 0., 3., 0.])}
    """

    name = "breadcrumbs_mask"

    def __init__(self, beta: float = 0.85, gamma: float = 0.007) -> None:
        if min(beta, gamma) < 0 or beta + gamma >= 1:
            raise ValueError(f"expected shares beta and gamma >= 0 with a sum below 1, got {beta} and {gamma}")
        self.beta = beta
        self.gamma = gamma

    @override
    def plan(self, vector: State, task: int) -> tuple[dict[str, Threshold], dict[str, Threshold]]:
        """Return the thresholds for the smallest and the largest entries to keep, where a device finds many at once."""
        if not any(entries_at_once(vector[name].device) for name in islice(vector, 1)):
            return {}, {}
        return (
            kth_largest_of_each(vector, lambda count: count - int(self.beta * count)),
            kth_largest_of_each(vector, lambda count: max(1, int(self.gamma * count))),
        )

    @override
    def sparsify(
        self, name: str, tau: Tensor, task: int, plan: tuple[dict[str, Threshold], dict[str, Threshold]]
    ) -> Tensor:
        count = tau.numel()
        num_large, num_small = int(self.gamma * count), int(self.beta * count)

        def largest(known: dict[str, Threshold], rank: int) -> Tensor:
            return keep_largest(tau, known[name] if name in known else kth_largest_magnitude([tau], rank))

        kept = largest(plan[0], count - num_small) if num_small else tau.clone()
        return kept.sub_(largest(plan[1], num_large)) if num_large else kept


class Breadcrumbs(Pipeline):
    """Drop outliers and small changes of every task vector, then add: ``scale * sum(mask(tau_t))``.

    Davari and Belilovsky, arXiv 2312.06795; the mask is ``BreadcrumbsMask``, tensor by tensor as in the paper. State: 4
    bytes per parameter.

    Other implementations differ: the released code ranks every row along the last dimension, drops the top share and
    then *keeps* a share of the row (nothing in very short rows); its search covers 0.05 to 0.2 for the kept share and
    0.001 to 0.01 for ``gamma``, starting at 0.15 (a ``beta`` of 0.85), 0.006 and a scale of 0.2. mergekit 0.1.5 also
    ranks whole tensors, but takes ``density = 1 - beta - gamma`` and rounds down the number of kept entries; here the
    numbers of dropped entries are rounded down.

    Args:
        beta: Share of the entries of smallest magnitude that is dropped, in [0, 1).
        gamma: Share of the entries of largest magnitude that is dropped, in [0, 1); ``beta + gamma < 1``.
        scale: Scaling coefficient of the sum.

    Example:
        >>> import torch
        >>> merger = Breadcrumbs(beta=0.25, gamma=0.25, scale=0.5)
        >>> merger.update({"w": torch.tensor([0.1, -4.0, 8.0, 2.0])})
        >>> merger.compute()
        {'w': tensor([ 0., -2.,  0.,  1.])}
    """

    name = "breadcrumbs"
    summary = "drop the largest and the smallest entries of every tensor, then add"
    source = "2312.06795"

    def __init__(self, beta: float = 0.85, gamma: float = 0.007, *, scale: float = 0.3) -> None:
        super().__init__(TaskArithmetic(scale), sparsifier=BreadcrumbsMask(beta, gamma))
        self.beta = beta
        self.gamma = gamma
        self.scale = scale
