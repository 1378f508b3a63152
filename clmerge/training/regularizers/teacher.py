"""A frozen earlier model, with which a regularizer compares the model in training."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from clmerge.models import Classifier
from clmerge.training.regularizers.regularizer import (
    BACKBONE,
    HEAD,
    Regularizer,
    current_weights,
    flat,
    named,
    run_with,
)
from clmerge.weights.modes import eval_mode
from clmerge.weights.parametrization import running_statistics, state_of


class TeacherRegularizer(Regularizer):
    """Keep the weights of an earlier model, and run it on every batch, in evaluation mode and without gradients.

    Costs one more forward pass per step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.teacher: Tensor
        self.keep("teacher", torch.empty(0))
        self._like: dict[str, Tensor] = {}

    @abstractmethod
    def frozen(self, module: Classifier) -> dict[str, Tensor]:
        """Return the tensors of the teacher: dense weights, running statistics, parameters of the head."""

    def remember(self, module: Classifier, *, again: bool) -> None:
        """Store the module's current tensors as the teacher.

        Args:
            module: The classifier.
            again: Whether an existing teacher is replaced.
        """
        tensors = self.frozen(module)
        self._like = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        if again or not self.teacher.numel():
            self.keep("teacher", flat(tensors))

    @torch.no_grad()
    def taught(self, module: Classifier, images: Tensor, *, features: bool = False) -> Tensor:
        """Return the teacher's output.

        Args:
            module: The classifier; unchanged.
            images: A batch, ``(B, 3, H, W)``.
            features: Whether to return features instead of logits.

        Returns:
            Logits ``(B, C)``, or features ``(B, D)``.
        """
        kept = named(self.teacher, self._like)
        base = {name: kept.pop(name) for name in module.trained_names}
        head = {name: kept.pop(name) for name in list(kept) if name.startswith(HEAD)}
        values = {**state_of(module, base, {}, buffers=kept), **head}
        part: nn.Module = module
        if features:
            part = module.backbone
            values = {name.removeprefix(BACKBONE): value for name, value in values.items()}
        with eval_mode(module):
            return run_with(part, values, images)


def backbone_tensors(module: Classifier) -> dict[str, Tensor]:
    """Return the trained dense weights and the running statistics."""
    weights = current_weights(module)
    device = next(iter(weights.values())).device
    return {**weights, **{name: value.to(device) for name, value in running_statistics(module).items()}}
