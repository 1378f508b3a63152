"""Interpolation between the merged model so far and the newest model: WiSE-FT and PAINT."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.checks import checked_share
from clmerge.merging.linear.soup import measured
from clmerge.merging.merger import Merger
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State, TaskVector, accumulator_dtype

_TENTHS = tuple(step / 10 for step in range(11))


class _Interpolation(Merger):
    """Move towards the newest task vector: ``m_t = (1 - alpha) m_(t-1) + alpha tau_t``, ``m_0 = 0``."""

    order_free = False
    slots = ("merged",)

    @override
    def _fold_block(self, slots: Slots, tau: Tensor, step: Step, plan: float) -> None:
        slots["merged"].lerp_(tau, plan)

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        return slots["merged"]


class WiSEFT(_Interpolation):
    """Interpolate between theta0 and the fine-tuned model (Wortsman et al., arXiv 2109.01903).

    After one task the result is ``alpha * tau_1``, WiSE-FT itself. Every further task interpolates with the same
    coefficient: ``m_t = (1 - alpha) m_(t-1) + alpha tau_t``. With start policy ``merged`` that is WiSE-FT applied
    again after every task. Weights of older tasks decay: task k weighs ``alpha (1 - alpha)^(t - k)``.
    State: 4 bytes per parameter.

    Args:
        alpha: Share of the newest model, in [0, 1].

    Example:
        >>> merger = WiSEFT(alpha=0.5)
        >>> merger.update({"w": torch.tensor([4.0])})
        >>> merger.update({"w": torch.tensor([8.0])})
        >>> merger.compute()
        {'w': tensor([5.])}
    """

    name = "wise_ft"
    summary = "interpolation with the newest model, at a fixed share"
    source = "2109.01903"
    scope = "entry"

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = checked_share("alpha", alpha)

    @override
    def _plan(self, vector: State, step: Step) -> float:
        return self.alpha


class PAINT(_Interpolation):
    """Patch by interpolation, at the share that scores best on held-out data (arXiv 2208.05592).

    Sequential patching: after every task ``m_t = (1 - alpha_t) m_(t-1) + alpha_t tau_t``, where ``alpha_t``
    is the candidate with the highest score. The paper's score is the mean of the accuracies on the tasks to
    patch and on those to support; between equal scores the first candidate is taken. State: 4 bytes per
    parameter; every ``update`` scores as many models as there are candidates.

    Args:
        alphas: The candidate shares of the newest model, each in [0, 1]. Default: 0, 0.1, ..., 1 as in the
            paper.

    Example:
        >>> merger = PAINT()
        >>> merger.update({"w": torch.tensor([4.0])}, score=lambda vector: -abs(vector["w"].item() - 1.2))
        >>> merger.chosen
        [0.3]
    """

    name = "paint"
    summary = "interpolation with the newest model, at the share that scores best"
    source = "2208.05592"
    requires_score = True

    def __init__(self, alphas: tuple[float, ...] = _TENTHS) -> None:
        super().__init__()
        if not alphas or not all(0 <= alpha <= 1 for alpha in alphas):
            raise ValueError(f"expected candidate shares in [0, 1], got {alphas}")
        self.alphas = tuple(alphas)
        self.chosen: list[float] = []
        self._keep("chosen")

    @override
    def _plan(self, vector: State, step: Step) -> float:
        if step.score is None:
            raise ValueError("expected a held-out metric for PAINT, got none; pass score=... to update()")
        scores = [measured(step.score, self._candidate(vector, alpha)) for alpha in self.alphas]
        return self.alphas[scores.index(max(scores))]

    def _candidate(self, vector: State, alpha: float) -> TaskVector:
        candidate = {}
        for name in vector:
            tau = vector[name].detach()
            tau = tau.to(accumulator_dtype(tau))
            # Before the first task the merged vector is zero and there are no accumulators yet.
            merged = self._slots[name]["merged"] if self._slots else torch.zeros_like(tau)
            candidate[name] = merged.lerp(tau.to(merged), alpha)
        return candidate

    @override
    def _after_update(self, step: Step, plan: float) -> None:
        self.chosen.append(plan)
