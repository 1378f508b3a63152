"""Penalise the distance to the features of an earlier model."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from clmerge.models import Classifier
from clmerge.training.regularizers.l2 import check_anchor
from clmerge.training.regularizers.regularizer import FisherOf, LossStep, check_strength
from clmerge.training.regularizers.teacher import TeacherRegularizer, backbone_tensors


class FeatureDistance(TeacherRegularizer):
    """Distance of every image's features to those of an earlier model, averaged over the batch.

    ``squared`` is ``strength / 2 * |f - f_old|^2`` (less-forgetting learning, arXiv 1607.00122), ``cosine`` is
    ``strength * (1 - cos(f, f_old))``, the less-forget constraint of LUCIR (CVPR 2019), which suits heads that
    normalise the features. The scale of features depends on the model, so the strength has no default. State:
    one copy of the trained weights, 4 bytes per parameter. Cost: one more forward pass per step.

    Args:
        strength: Factor of the term.
        to: The earlier model: ``previous``, the one at the start of the task, or ``base``, the one before the
            first task.
        distance: ``squared`` or ``cosine``.

    Raises:
        ValueError: For a negative strength, or an unknown anchor or distance.
    """

    name: ClassVar[str] = "features"

    def __init__(
        self,
        strength: float,
        *,
        to: Literal["previous", "base"] = "previous",
        distance: Literal["squared", "cosine"] = "squared",
    ) -> None:
        super().__init__()
        self.strength = check_strength(strength, "FeatureDistance")
        self.goal = check_anchor(to)
        if distance not in ("squared", "cosine"):
            raise ValueError(f"expected distance='squared' or 'cosine', got {distance!r}")
        self.distance = distance

    @override
    def frozen(self, module: Classifier) -> dict[str, Tensor]:
        return backbone_tensors(module)

    @override
    def begin_task(self, module: Classifier, fisher: FisherOf) -> None:
        self.remember(module, again=self.goal == "previous")

    @override
    def penalty(self, step: LossStep) -> Tensor:
        teacher = self.taught(step.module, step.images, features=True)
        if self.distance == "cosine":
            return self.strength * (1 - functional.cosine_similarity(step.features, teacher, dim=1)).mean()
        return self.strength / 2 * (step.features - teacher).square().sum(dim=1).mean()
