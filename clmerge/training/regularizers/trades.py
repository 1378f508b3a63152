"""Adversarial training as a term of the loss."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from clmerge.models import Classifier
from clmerge.models.adversary import Ball, attacked
from clmerge.models.pixels import normalisation
from clmerge.training.regularizers.regularizer import FisherOf, LossStep, Regularizer, check_strength
from clmerge.weights.modes import eval_mode


class TRADES(Regularizer):
    """``strength * max KL(f(x), f(x'))`` over images x' in a ball around x: adversarial training (arXiv 1901.08573).

    The worst x' is found by projected gradient ascent from a random point of the ball, in evaluation mode, by steps of
    ``2.5 * eps / steps``. The loss of the task stays that of the clean images. Costs ``steps + 1`` forward and backward
    passes per step. With several balls task t is trained against ball ``t`` modulo their number, which makes experts
    that are robust to different attacks (for lp-robust soups, arXiv 2302.10164); a ball of radius 0 adds nothing.

    Args:
        strength: Factor of the term; 6 in the paper.
        threats: The balls, in pixels of [0, 1]; default ``linf`` of 8/255.
        steps: Steps of the inner ascent; 10 in the paper.

    Raises:
        ValueError: For a negative strength, no ball or no step.
    """

    name: ClassVar[str] = "trades"

    def __init__(self, strength: float = 6.0, *, threats: list[Ball] | None = None, steps: int = 10) -> None:
        super().__init__()
        self.strength = check_strength(strength, "TRADES")
        self.threats = [Ball()] if threats is None else list(threats)
        self.steps = steps
        if not self.threats or steps < 1:
            raise ValueError(f"expected one ball or more and 1 step or more, got {len(self.threats)} and {steps}")
        self.begun: Tensor
        self.keep("begun", torch.zeros(()))

    @override
    def begin_task(self, module: Classifier, fisher: FisherOf) -> None:
        self.keep("begun", self.begun + 1)

    @property
    def threat(self) -> Ball:
        """The ball of the current task."""
        return self.threats[max(0, int(self.begun) - 1) % len(self.threats)]

    @override
    def penalty(self, step: LossStep) -> Tensor:
        ball, module = self.threat, step.module
        if not ball.eps or not self.strength:
            return step.logits.new_zeros(())
        clean = _competing(module, step.logits).log_softmax(dim=1)
        fixed = clean.detach()
        mean, deviation = normalisation(module.backbone.eval_transform)
        with eval_mode(module):
            worst = attacked(
                step.images,
                lambda images: _divergence(fixed, _competing(module, module(images))),
                ball,
                start=ball.random(step.images),
                steps=self.steps,
                step_size=2.5 * ball.eps / self.steps,
                normalise=(mean.to(step.images), deviation.to(step.images)),
            )
        return self.strength * _divergence(clean, _competing(module, module(worst))).mean()


def _competing(module: Classifier, logits: Tensor) -> Tensor:
    """Return the logits of the classes that compete in the loss."""
    return logits[:, list(module.competing(logits.shape[1]))]


def _divergence(clean: Tensor, logits: Tensor) -> Tensor:
    """Return KL(clean, softmax of the logits) of every image, ``(B,)``."""
    return functional.kl_div(logits.log_softmax(dim=1), clean, reduction="none", log_target=True).sum(dim=1)
