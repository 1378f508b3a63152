"""Write a secret message into weights while they are trained."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
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
from clmerge.weights.secrets import MarkedPart, Secret, marked_names, marked_part, marked_vector


class WeightWatermark(Regularizer):
    """``strength`` times the mean cross-entropy between ``sigmoid(X w)`` and secret bits (Uchida, arXiv 1701.04082).

    ``w`` is the marked part of the chosen weights, flattened; bits and ``X``, which is ``bits x numel`` from N(0, 1),
    come from the key alone. The paper marks one layer's weights, averaged over its filters. Whoever knows the key
    reads the bits as ``X w > 0``: the probe ``WatermarkBits``. State: theta_0 of the chosen weights. Cost: a projection
    per step, drawn again where it takes more than 64 MiB.

    Args:
        key: The secret. It is in the configuration of the run: keep that to yourself.
        parameter: Glob pattern of the names of the weights that carry the mark, such as
            ``*resblocks.0.mlp.c_fc.weight``.
        bits: Length of the message.
        strength: Factor of the term; the paper uses 0.01.
        of: What of the weights carries the mark: ``task_vector``, their difference from theta_0 (default), ``weights``,
            as in the paper, or ``rounding``: what rounding to int8 takes away, so that the int8 model is without it
            (after the quantisation watermark, arXiv 2310.11237).
        tasks: Indices of the tasks that mark; default all.

    Raises:
        ValueError: For a negative strength, no bits, or an unknown part.
    """

    name: ClassVar[str] = "watermark"

    def __init__(
        self,
        key: str,
        parameter: str,
        *,
        bits: int = 64,
        strength: float = 0.01,
        of: MarkedPart = "task_vector",
        tasks: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.strength = check_strength(strength, "WeightWatermark")
        self.secret, self.parameter, self.of, self.tasks = Secret(key, bits), parameter, marked_part(of), tasks
        self.base: Tensor
        self.num_past: Tensor
        self.keep("base", torch.empty(0))
        self.keep("num_past", torch.zeros((), dtype=torch.long))
        self._task = 0  # a number, which does not make a GPU wait at every step

    @override
    def begin_task(self, module: Classifier, fisher: FisherOf) -> None:
        chosen = self._chosen(current_weights(module))
        if not self.base.numel():
            self.keep("base", flat(chosen))
        self._task = int(self.num_past)

    def _chosen(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: weights[name] for name in marked_names(weights, self.parameter)}

    @override
    def penalty(self, step: LossStep) -> Tensor:
        if self.tasks is not None and self._task not in self.tasks:
            return step.logits.new_zeros(())
        weights = self._chosen(current_weights(step.module))
        vector = marked_vector(weights, named(self.base, weights), "*", self.of)
        found = self.secret.read(vector)
        return self.strength * functional.binary_cross_entropy_with_logits(found, self.secret.message.to(found))

    @override
    def end_task(self, module: Classifier, fisher: FisherOf) -> None:
        self.keep("num_past", self.num_past + 1)
