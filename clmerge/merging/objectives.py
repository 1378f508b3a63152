"""Objectives: what learned coefficients, gates and calibrations minimise on adaptation images."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from clmerge.merging.checks import checked_choice
from clmerge.settings import Configured

Heads: TypeAlias = Literal["task", "seen"]


@dataclass(frozen=True)
class Outputs:
    """What a model says of a batch.

    Attributes:
        logits: ``(B, C)`` over all classes of the stream; ``-inf`` for classes that the head does not know.
        features: ``(B, D)``.
    """

    logits: Tensor
    features: Tensor


@dataclass(frozen=True)
class Given:
    """What is known of a batch beside its images.

    Attributes:
        task_classes: Class ids of the batch's task, ``(K,)``, ascending.
        seen_classes: Class ids of all tasks merged so far, ascending.
        labels: Class ids ``(B,)``, where labels may be seen.
        expert: Outputs of the un-merged expert of the batch's task, where the objective needs them.
    """

    task_classes: Tensor
    seen_classes: Tensor
    labels: Tensor | None = None
    expert: Outputs | None = None


class Objective(Configured, ABC):
    """A loss of a model's outputs on a batch of images of one task.

    Args:
        heads: Which classes compete: those of the batch's ``task`` (the choice of AdaMerging: the task of an
            adaptation image is known), or all ``seen`` so far.

    Attributes:
        needs_labels: Whether it reads labels.
        needs_expert: Whether it reads the outputs of the task's expert.

    Raises:
        ValueError: For other ``heads``.
    """

    needs_labels: ClassVar[bool] = False
    needs_expert: ClassVar[bool] = False

    def __init__(self, *, heads: Heads = "task") -> None:
        self.heads = checked_choice("heads", heads, Heads)

    @abstractmethod
    def __call__(self, model: Outputs, given: Given) -> Tensor:
        """Return the loss, a scalar, float32 or float64.

        Args:
            model: Outputs of the model that is adapted.
            given: What is known of the batch.
        """

    def columns(self, given: Given) -> Tensor:
        """Return the ids of the classes that compete."""
        return given.task_classes if self.heads == "task" else given.seen_classes

    def logits(self, outputs: Outputs, given: Given) -> Tensor:
        """Return the logits of the classes that compete, in float32 or more."""
        return outputs.logits[:, self.columns(given)].to(torch.promote_types(outputs.logits.dtype, torch.float32))


class Entropy(Objective):
    """Mean entropy of the predictions: needs no labels (AdaMerging, arXiv 2310.02575).

    Example:
        >>> outputs = Outputs(torch.tensor([[1.3, 0.8]]), torch.zeros(1, 1))
        >>> Entropy()(outputs, Given(torch.arange(2), torch.arange(2)))
        tensor(0.6628)
    """

    @override
    def __call__(self, model: Outputs, given: Given) -> Tensor:
        log_p = self.logits(model, given).log_softmax(dim=1)
        return -(log_p.exp() * log_p).sum(dim=1).mean()


class CrossEntropy(Objective):
    """Mean cross-entropy with the labels."""

    needs_labels = True

    @override
    def __call__(self, model: Outputs, given: Given) -> Tensor:
        assert given.labels is not None
        position = torch.searchsorted(self.columns(given), given.labels)
        return functional.cross_entropy(self.logits(model, given), position)


class Distillation(Objective):
    """Mean cross-entropy with the softened predictions of the task's expert (Hinton et al., arXiv 1503.02531).

    Args:
        heads: As for ``Objective``.
        temperature: Divides all logits.

    Raises:
        ValueError: If the temperature is not positive.
    """

    needs_expert = True

    def __init__(self, *, heads: Heads = "task", temperature: float = 2.0) -> None:
        super().__init__(heads=heads)
        if temperature <= 0:
            raise ValueError(f"expected a temperature above 0, got {temperature}")
        self.temperature = temperature

    @override
    def __call__(self, model: Outputs, given: Given) -> Tensor:
        assert given.expert is not None
        wanted = (self.logits(given.expert, given) / self.temperature).softmax(dim=1)
        log_p = (self.logits(model, given) / self.temperature).log_softmax(dim=1)
        return -(wanted * log_p).sum(dim=1).mean()


class Agreement(Objective):
    """Cross-entropy with the expert's predicted class, where it is to be trusted (SyMerge, arXiv 2412.19098).

    An image counts if the model predicts the same class, or the expert is at least as confident as the model. Without
    such an image the loss is zero; the released code's is NaN then.
    """

    needs_expert = True

    @override
    def __call__(self, model: Outputs, given: Given) -> Tensor:
        assert given.expert is not None
        logits = self.logits(model, given)
        confidence, predicted = logits.detach().softmax(dim=1).max(dim=1)
        trust, wanted = self.logits(given.expert, given).softmax(dim=1).max(dim=1)
        kept = (predicted == wanted) | (trust >= confidence)
        losses = functional.cross_entropy(logits, wanted, reduction="none")
        return (losses * kept).sum() / kept.sum().clamp(min=1)


class FeatureMatch(Objective):
    """Mean distance of the features from those of the task's expert.

    Args:
        heads: As for ``Objective``; features have none.
        power: 1 for absolute differences (Representation Surgery, arXiv 2402.02705), 2 for squares (ZipLoRA,
            arXiv 2311.13600).

    Raises:
        ValueError: For another power.
    """

    needs_expert = True

    def __init__(self, *, heads: Heads = "task", power: Literal[1, 2] = 1) -> None:
        super().__init__(heads=heads)
        self.power = checked_choice("power", power, Literal[1, 2])

    @override
    def __call__(self, model: Outputs, given: Given) -> Tensor:
        assert given.expert is not None
        difference = model.features - given.expert.features
        return (difference.abs() if self.power == 1 else difference.square()).mean()
