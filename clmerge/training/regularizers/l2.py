"""Penalise the distance to the weights at the start of a task, or to the base model."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.models import Classifier
from clmerge.training.regularizers.regularizer import (
    FisherOf,
    LossStep,
    Regularizer,
    check_strength,
    current_weights,
    flat,
    named,
)


class L2(Regularizer):
    """``strength / 2 * |theta - anchor|^2`` over all merged weights (L2-SP, arXiv 1802.01483).

    The paper tunes strengths from 0.001 to 1, so there is no default. Unlike weight decay, the term pulls to the
    anchor, not to zero, and its gradient is scaled by the optimizer. State: the anchor, 4 bytes per parameter.

    Args:
        strength: Factor of the term.
        to: The anchor: ``previous``, the weights at the start of the task (of the previous task, the merged or the base
            model, according to the start policy), or ``base``, the weights before the first task.

    Raises:
        ValueError: For a negative strength or an unknown anchor.
    """

    name: ClassVar[str] = "l2"

    def __init__(self, strength: float, *, to: Literal["previous", "base"] = "previous") -> None:
        super().__init__()
        self.strength = check_strength(strength, "L2")
        self.goal = check_anchor(to)
        self.anchor: Tensor
        self.keep("anchor", torch.empty(0))

    @override
    def begin_task(self, module: Classifier, fisher: FisherOf) -> None:
        if self.goal == "previous" or not self.anchor.numel():
            self.keep("anchor", flat(current_weights(module)))

    @override
    def penalty(self, step: LossStep) -> Tensor:
        weights = current_weights(step.module)
        anchors = named(self.anchor, weights)
        squares = [(weight - anchors[name]).square().sum() for name, weight in weights.items()]
        return self.strength / 2 * torch.stack(squares).sum()


def check_anchor(to: str) -> str:
    """Return the name of an anchor.

    Raises:
        ValueError: If it is neither ``previous`` nor ``base``.
    """
    if to not in ("previous", "base"):
        raise ValueError(f"expected to='previous' or to='base', got {to!r}")
    return to
