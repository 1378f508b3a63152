"""Second-order penalties around the base model, so that task vectors can be averaged: ITA and IEL."""

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
from clmerge.weights.parametrization import state_of
from clmerge.weights.swap import swapped


class _AroundBase(Regularizer):
    """Keep the base model and its Fisher information, averaged over the tasks' images."""

    def __init__(self) -> None:
        super().__init__()
        self.base: Tensor
        self.fisher: Tensor
        self.num_measured: Tensor
        self.keep("base", torch.empty(0))
        self.keep("fisher", torch.empty(0))
        self.keep("num_measured", torch.zeros((), dtype=torch.long))

    @override
    def begin_task(self, module: Classifier, fisher: FisherOf) -> None:
        if not self.base.numel():
            self.keep("base", flat(current_weights(module)))

    def measure(self, module: Classifier, fisher: FisherOf) -> None:
        """Add the current task to the mean Fisher information of the base model."""
        weights = current_weights(module)
        with swapped(module, state_of(module, named(self.base, weights), {}), origin="the base model"):
            measured = fisher()
        new = flat({name: measured[name] for name in weights}).to(self.base)
        old = self.fisher if self.fisher.numel() else torch.zeros_like(new)
        self.keep("num_measured", self.num_measured + 1)
        self.keep("fisher", old + (new - old) / self.num_measured)


class ITA(_AroundBase):
    """``alpha / 2 * tau^T F tau`` with the task vector tau: incremental task arithmetic (arXiv 2405.16350).

    ``F`` is the diagonal Fisher information of the base model on the images of the earlier tasks, a mean with equal
    weight per task; there is no term in the first task. Meant for ``start_policy: base`` and the average of
    the task vectors (``WeightAverage``). The authors measure F with a head that was aligned to the base model's
    features; here it is the head at the end of the task, and a text head needs no alignment. They also apply the term
    as a separate optimizer step; here it is part of the loss. State: 8 bytes per parameter.

    Args:
        alpha: Factor of the term; the authors' code uses 0.02 for CIFAR-100 (default) and 5 for CropDisease.

    Raises:
        ValueError: For a negative factor.
    """

    name: ClassVar[str] = "ita"

    def __init__(self, alpha: float = 0.02) -> None:
        super().__init__()
        self.alpha = check_strength(alpha, "ITA")

    @override
    def penalty(self, step: LossStep) -> Tensor:
        if not self.fisher.numel():
            return step.logits.new_zeros(())
        weights = current_weights(step.module)
        base, fisher = named(self.base, weights), named(self.fisher, weights)
        terms = [(fisher[name] * (weight - base[name]).square()).sum() for name, weight in weights.items()]
        return self.alpha / 2 * torch.stack(terms).sum()

    @override
    def end_task(self, module: Classifier, fisher: FisherOf) -> None:
        self.measure(module, fisher)


class IEL(_AroundBase):
    """Train a task vector as a part of the average: incremental ensemble learning (arXiv 2405.16350).

    The task's loss is that of the composed model, ``theta_0 + (tau_1 + ... + tau_t) / t``, in which only ``tau_t`` is
    trained, and the term is ``beta * (1/2 (1 - 1/t) tau_t^T F tau_t - 1/t tau_t^T F (tau_1 + ... + tau_(t-1)))``: it
    pulls the task vectors towards each other where the Fisher information F of the base model, on the images of all
    tasks so far, is large. In the first task t is taken as 2 in the term, as in the authors' code. F is measured at
    the start of a task, so random new rows of a head make it less accurate; a text head has none. Meant for
    ``start_policy: base`` and ``WeightAverage``; validation inside of the fit uses the task's own model. State: 12
    bytes per parameter.

    Args:
        beta: Factor of the term. The authors' code has no published value, so there is no default.

    Raises:
        ValueError: For a negative factor.
    """

    name: ClassVar[str] = "iel"

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = check_strength(beta, "IEL")
        self.past: Tensor
        self.num_past: Tensor
        self.keep("past", torch.empty(0))
        self.keep("num_past", torch.zeros((), dtype=torch.long))
        self._num_tasks = 1  # a number, which does not make a GPU wait at every step

    @override
    def begin_task(self, module: Classifier, fisher: FisherOf) -> None:
        super().begin_task(module, fisher)
        if not self.past.numel():
            self.keep("past", torch.zeros_like(self.base))
        self._num_tasks = int(self.num_past) + 1
        self.measure(module, fisher)

    @override
    def weights(self, module: Classifier) -> dict[str, Tensor]:
        now = current_weights(module)
        base, past = named(self.base, now), named(self.past, now)
        mean = {name: (past[name] + (weight - base[name])) / self._num_tasks for name, weight in now.items()}
        return state_of(module, base, mean)

    @override
    def penalty(self, step: LossStep) -> Tensor:
        weights = current_weights(step.module)
        base, past, fisher = (named(flat_tensor, weights) for flat_tensor in (self.base, self.past, self.fisher))
        share = 1 / max(2, self._num_tasks)
        terms = []
        for name, weight in weights.items():
            tau = weight - base[name]
            terms.append((fisher[name] * tau * ((1 - share) / 2 * tau - share * past[name])).sum())
        return self.beta * torch.stack(terms).sum()

    @override
    def end_task(self, module: Classifier, fisher: FisherOf) -> None:
        self.keep("past", self.past + flat(current_weights(module)) - self.base)
        self.keep("num_past", self.num_past + 1)
