"""Sequential unlearning: learn some tasks, and subtract what the training of others has moved."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.merger import Merger
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State


class SSU(Merger):
    """Answer requests to unlearn, one after the other, among tasks that are learned (SSU, arXiv 2406.10952).

    A task to learn is taken over as it is, ``m_t = tau_t``. Of a request, what its training has moved is subtracted
    instead of added: ``m_t = m_(t-1) - strength (tau_t - m_(t-1))``, with ``m_0 = 0``. With start policy ``merged``
    every task starts from the model so far, ``theta_0 + m_(t-1)``, and that is the paper's update. The paper trains on
    a request with gradients masked by their salience, which is ``clmerge.callbacks.SalienceMask``, and with a further
    loss of random labels, which ``clmerge forget --method ssu`` has. State: 4 bytes per parameter.

    Args:
        requests: Indices of the tasks that are requests to unlearn.
        strength: Factor of what is subtracted.

    Example:
        >>> import torch
        >>> merger = SSU(requests=[1])
        >>> merger.update({"w": torch.tensor([4.0])})
        >>> merger.update({"w": torch.tensor([5.0])})
        >>> merger.compute()
        {'w': tensor([3.])}
    """

    name = "ssu"
    summary = "learn some tasks, subtract what the training of others has moved"
    source = "2406.10952"
    order_free = False
    slots = ("merged",)
    scope = "entry"

    def __init__(self, requests: Sequence[int] = (), strength: float = 1.0) -> None:
        super().__init__()
        self.requests = list(requests)
        self.strength = strength

    @override
    def _plan(self, vector: State, step: Step) -> float:
        return -self.strength if step.task in self.requests else 1.0

    @override
    def _fold_block(self, slots: Slots, tau: Tensor, step: Step, plan: float) -> None:
        slots["merged"].lerp_(tau, plan)

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        return slots["merged"]
