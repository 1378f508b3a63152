"""Learning without forgetting: distil the previous model's outputs for the old classes."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from clmerge.models import Classifier
from clmerge.training.regularizers.regularizer import HEAD, FisherOf, LossStep, check_strength
from clmerge.training.regularizers.teacher import TeacherRegularizer, backbone_tensors


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the mean cross-entropy between two softened outputs (arXiv 1606.09282, equations 2 and 3).

    Args:
        logits: Outputs of the model in training, ``(B, C)``.
        teacher: Outputs of the model before the task, ``(B, C)``.
        temperature: Divisor of both outputs.

    Example:
        >>> import torch
        >>> distillation(torch.zeros(1, 2), torch.tensor([[0.0, 4.0]]), 2.0)  # log 2, whatever the teacher says
        tensor(0.6931)
    """
    return functional.cross_entropy(logits / temperature, (teacher / temperature).softmax(dim=1))


class LwF(TeacherRegularizer):
    """Distil the old classes' outputs of the model at the start of the task, on the new images (arXiv 1606.09282).

    ``strength * distillation`` over the classes seen before the task, in one softmax as in FACIL (arXiv 2010.15277);
    no term in the first task. Works with text heads and growing heads; if the loss covers the ``current`` classes
    only, a growing head's old rows are not trained and only the features adapt. State: one copy of the trained weights
    and the head, 4 bytes per parameter. Cost: one more forward pass per step.

    Args:
        strength: Factor of the term: 1 in the paper (default), 0.3 in MagMax's baseline (arXiv 2407.06322).
        temperature: Temperature of both softmaxes; 2 in both papers.

    Raises:
        ValueError: For a negative strength, or a temperature that is not positive.
    """

    name: ClassVar[str] = "lwf"

    def __init__(self, strength: float = 1.0, *, temperature: float = 2.0) -> None:
        super().__init__()
        self.strength = check_strength(strength, "LwF")
        if not temperature > 0:
            raise ValueError(f"expected a positive temperature, got {temperature}")
        self.temperature = temperature

    @override
    def frozen(self, module: Classifier) -> dict[str, Tensor]:
        head = {HEAD + name: parameter for name, parameter in module.head.named_parameters()}
        return {**backbone_tensors(module), **head}

    @override
    def begin_task(self, module: Classifier, fisher: FisherOf) -> None:
        self.remember(module, again=True)

    @override
    def penalty(self, step: LossStep) -> Tensor:
        old = step.module.old_classes
        if not old:
            return step.logits.new_zeros(())
        teacher = self.taught(step.module, step.images)
        return self.strength * distillation(step.logits[:, old], teacher[:, old], self.temperature)
