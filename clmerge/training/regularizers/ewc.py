"""Elastic weight consolidation: penalise changes of weights that are important for earlier tasks."""

from __future__ import annotations

from typing import ClassVar

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


class EWC(Regularizer):
    """``strength / 2 * sum over k of F_k * (theta - theta_k)^2``, one quadratic per earlier task (arXiv 1612.00796).

    ``theta_k`` are the weights at the end of task k, for any start policy, and ``F_k`` is the diagonal
    Fisher information there (exact per image, labels drawn from the model, ``learner.statistics_images`` images).

    The sum of all quadratics is one quadratic, ``A * (theta - m)^2 + c``, with ``A`` the sum of the Fisher information,
    ``m`` the mean of ``theta_k`` weighted by ``F_k``, and ``c`` a constant. All three are updated task by task, so the
    state is 8 bytes per parameter for any number of tasks, and the term is exact.

    With ``decay`` it is online EWC (arXiv 1801.10112): ``A = decay * A + F_k``, around the weights of the last task.

    Args:
        strength: Factor of the term. Default 5000, as in FACIL (arXiv 2010.15277). The EWC baseline of MagMax (arXiv
            2407.06322), based on FACIL's code, uses 1e6 with a Fisher information of another scale.
        decay: Decay of online EWC in [0, 1]; default none, one quadratic per task.

    Raises:
        ValueError: For a negative strength, or a decay outside [0, 1].
    """

    name: ClassVar[str] = "ewc"

    def __init__(self, strength: float = 5000.0, *, decay: float | None = None) -> None:
        super().__init__()
        self.strength = check_strength(strength, "EWC")
        if decay is not None and not 0.0 <= decay <= 1.0:
            raise ValueError(f"expected a decay in [0, 1], or none, got {decay}")
        self.decay = decay
        self.anchor: Tensor
        self.fisher: Tensor
        self.constant: Tensor
        self.keep("anchor", torch.empty(0))
        self.keep("fisher", torch.empty(0))
        self.keep("constant", torch.zeros(()))

    @override
    def penalty(self, step: LossStep) -> Tensor:
        if not self.anchor.numel():
            return step.logits.new_zeros(())
        weights = current_weights(step.module)
        anchors, fisher = named(self.anchor, weights), named(self.fisher, weights)
        terms = [(fisher[name] * (weight - anchors[name]).square()).sum() for name, weight in weights.items()]
        return self.strength / 2 * (torch.stack(terms).sum() + self.constant)

    @override
    def end_task(self, module: Classifier, fisher: FisherOf) -> None:
        weights = current_weights(module)
        theta, measured = flat(weights), fisher()
        new = flat({name: measured[name] for name in weights}).to(theta)
        if not self.anchor.numel():
            self.keep("anchor", theta)
            self.keep("fisher", new)
        elif self.decay is not None:
            self.keep("anchor", theta)
            self.keep("fisher", self.decay * self.fisher + new)
        else:
            total = self.fisher + new
            share = torch.where(total > 0, new / total, 0.0)
            distance = theta - self.anchor
            self.keep("constant", self.constant + (share * self.fisher * distance.square()).sum())
            self.keep("anchor", self.anchor + share * distance)
            self.keep("fisher", total)
