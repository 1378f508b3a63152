"""Sequential interpolation with the previous merged model: CoMA, and CoFiMA with the Fisher information."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.precision.informed import Informed
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State


class CoFiMA(Informed):
    """Interpolate between the merged model and the new one, weighted by the Fisher (arXiv 2312.08977).

    ``merged = ((1 - a) F' merged + a F tau) / ((1 - a) F' + a F)`` with ``a = alpha``, the diagonal Fisher ``F`` of
    the new task and ``F'`` of the task before it; the first task vector is taken unchanged. Theta0 cancels. Made
    for tasks trained sequentially from the merged model. The Fisher of older tasks is not accumulated, so the
    result depends on the order of tasks. Entries without information in both tasks are interpolated as without
    Fisher; the released code divides 0 by 0 there. State: 8 bytes per parameter, 4 without Fisher.

    Args:
        alpha: Share of the new task, in (0, 1]. The released code has 0.4 on CIFAR-100 and ImageNet-R and 0.5 on
            others.
        use_fisher: Whether to weight by the Fisher; False is CoMA, which requires no statistics.
        clip: Upper bound at which the Fisher information is clipped. The released code uses 1e-4, for Fishers of
            batch-mean gradients; the paper's rule has no bound.
        floor: Least Fisher information of an entry, above 0.

    Raises:
        ValueError: If ``alpha``, ``clip`` or ``floor`` is out of range.

    Example:
        >>> import torch
        >>> merger = CoFiMA(alpha=0.5)
        >>> merger.update({"w": torch.tensor([0.0])}, statistics={"fisher": {"w": torch.tensor([1.0])}})
        >>> merger.update({"w": torch.tensor([4.0])}, statistics={"fisher": {"w": torch.tensor([3.0])}})
        >>> merger.compute()
        {'w': tensor([3.])}
    """

    name = "cofima"
    summary = "interpolation with the previous merged model, weighted by the Fisher information"
    source = "2312.08977"
    order_free = False
    scope = "parameter"
    slots: tuple[str, ...] = ("merged", "fisher")

    def __init__(
        self,
        alpha: float = 0.5,
        *,
        use_fisher: bool = True,
        clip: float | None = None,
        floor: float = 1e-12,
        statistic: str = "fisher",
    ) -> None:
        super().__init__(statistic)
        if not 0 < alpha <= 1:
            raise ValueError(f"expected alpha in (0, 1], got {alpha}")
        if not floor > 0 or (clip is not None and not clip >= floor):
            raise ValueError(f"expected 0 < floor <= clip, got floor {floor} and clip {clip}")
        self.alpha = alpha
        self.use_fisher = use_fisher
        self.clip = clip
        self.floor = floor
        if not use_fisher:
            self.slots, self.requires = ("merged",), frozenset()

    @override
    def _plan(self, vector: State, step: Step) -> tuple[State, Any]:
        return super()._plan(vector, step) if self.use_fisher else ({}, None)

    @override
    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: tuple[State, Any]) -> None:
        if self.use_fisher:
            super()._fold(name, slots, tau, step, plan)
        else:
            slots["merged"].lerp_(tau.to(slots["merged"].dtype), self.alpha if step.position else 1.0)

    @override
    def _fold_informed(self, slots: Slots, tau: Tensor, information: Tensor, step: Step, plan: Any) -> None:
        new = information.clamp(self.floor, self.clip)
        share = self.alpha * new
        if step.position:
            share = share / ((1 - self.alpha) * slots["fisher"] + share)
        else:
            share.fill_(1)
        slots["merged"].lerp_(tau, share)
        slots["fisher"].copy_(new)

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        return slots["merged"]
