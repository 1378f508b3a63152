"""Mean Teacher: agree with the moving average of one's own weights."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.models import Classifier
from clmerge.training.regularizers.regularizer import HEAD, FisherOf, LossStep, check_strength, flat
from clmerge.training.regularizers.teacher import TeacherRegularizer, backbone_tensors


class MeanTeacher(TeacherRegularizer):
    """Keep the answers near those of a moving average of the model (Tarvainen and Valpola, arXiv 1703.01780).

    ``strength * mean((softmax(student) - softmax(teacher))^2)`` over images and classes. The teacher begins a task (or
    one of its branches) as the model does, and moves by ``1 - decay`` towards it before every optimizer step; it is run
    in evaluation mode on the student's images. ``learner.trajectory=EMA`` with the same decay makes the average the
    task's expert, too.
    State: one copy of the trained weights and the head. Cost: one more forward pass per step.

    Args:
        strength: Factor of the term.
        decay: Share of the teacher that stays at every step, from 0 to below 1; 0.99 to 0.999 in the paper.

    Raises:
        ValueError: If a number is out of range.
    """

    name: ClassVar[str] = "mean_teacher"

    def __init__(self, strength: float = 1.0, *, decay: float = 0.99) -> None:
        super().__init__()
        self.strength = check_strength(strength, "MeanTeacher")
        if not 0 <= decay < 1:
            raise ValueError(f"expected decay from 0 to below 1, got {decay}")
        self.decay = decay
        self._step = 0

    @override
    def frozen(self, module: Classifier) -> dict[str, Tensor]:
        head = {HEAD + name: parameter for name, parameter in module.head.named_parameters()}
        return {**backbone_tensors(module), **head}

    @override
    def begin_task(self, module: Classifier, fisher: FisherOf) -> None:
        self.begin_branch(module)

    @override
    def begin_branch(self, module: Classifier) -> None:
        self.remember(module, again=True)
        self._step = 0

    @override
    def penalty(self, step: LossStep) -> Tensor:
        taken = int(getattr(step.module, "global_step", 0))
        if taken != self._step:  # once a step, also where it has several batches or, with SAM, several passes
            self._step = taken
            with torch.no_grad():
                self.teacher.lerp_(flat(self.frozen(step.module)).to(self.teacher), 1 - self.decay)
        difference = step.logits.softmax(dim=1) - self.taught(step.module, step.images).softmax(dim=1)
        return self.strength * difference.square().mean()
