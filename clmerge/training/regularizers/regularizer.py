"""The interface of regularizers, the weights they act on, and the sum of their terms in a training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clmerge.models import Classifier
from clmerge.streams import StreamDataModule
from clmerge.weights.parametrization import dense_weights
from clmerge.weights.selection import COMPILE_PREFIX

BACKBONE, HEAD = "backbone.", "head."
FisherOf = Callable[[], Mapping[str, Tensor]]
"""Measures the diagonal Fisher information of the current weights, by dense name, on images of the current task."""


@dataclass(frozen=True)
class LossStep:
    """The data of one training step that regularizers use.

    Attributes:
        module: The classifier in training.
        images: The batch, ``(B, 3, H, W)``.
        features: The backbone's features, ``(B, D)``.
        logits: Logits over all classes of the stream, ``(B, C)``.
    """

    module: Classifier
    images: Tensor
    features: Tensor
    logits: Tensor


class Regularizer(nn.Module, ABC):
    """A term of the training loss; the terms of a list of regularizers are added.

    The state of a regularizer (anchors, Fisher information) is kept in frozen parameters: part of the module's
    ``state_dict``, so that it is in every checkpoint and moves with the module, and the same on all ranks. Buffers are
    not used because DDP would broadcast them at every step.

    Attributes:
        name: Name of the term in the loggers, ``train/NAME``.
    """

    name: ClassVar[str]

    def begin_stream(self, module: Classifier, num_classes: int, prompts: Sequence[Sequence[str]]) -> None:
        """Prepare for a stream, once its head is built.

        Args:
            module: The classifier.
            num_classes: Number of classes of the whole stream.
            prompts: One list of prompts per class; empty without a text head.
        """

    def look_ahead(self, module: Classifier, data: StreamDataModule) -> None:
        """Look at the images of a task that is about to begin; called before :meth:`begin_task`, on all ranks.

        Args:
            module: The classifier after the start policy was applied; must not be changed.
            data: Its ``task`` is the index of the task in the stream.
        """

    def begin_task(self, module: Classifier, fisher: FisherOf) -> None:
        """Update the state at the start of a task; depends only on the starting weights and the earlier state.

        Args:
            module: The classifier after the start policy was applied.
            fisher: Measures the Fisher information of the current weights of ``module``.
        """

    def begin_branch(self, module: Classifier) -> None:
        """Renew what a fit changes of the state, before each of several fits of a task, none of which knows another.

        Args:
            module: The classifier with the weights that the fit starts from.
        """

    @abstractmethod
    def penalty(self, step: LossStep) -> Tensor:
        """Return the term: a scalar, differentiable by the trained parameters."""

    def weights(self, module: Classifier) -> dict[str, Tensor] | None:
        """Return weights to compute the task's loss with, by the module's names; None for the trained weights."""
        return None

    def end_task(self, module: Classifier, fisher: FisherOf) -> None:
        """Update the state at the end of a task.

        Args:
            module: The trained classifier.
            fisher: Measures the Fisher information of the current weights of ``module``.
        """

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def keep(self, name: str, value: Tensor) -> None:
        """Store a copy of a tensor as ``self.NAME``.

        Args:
            name: Name of the attribute.
            value: The new value; may have another shape than the old one.
        """
        setattr(self, name, nn.Parameter(value.detach().clone(), requires_grad=False))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # The state has no shape before the first task.
        for name, own in list(self._parameters.items()):
            saved = state_dict.get(prefix + name)
            if saved is not None and own is not None and saved.shape != own.shape:
                self.keep(name, torch.empty_like(saved, device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def current_weights(module: Classifier) -> dict[str, Tensor]:
    """Return the module's current values of the dense weights that are merged; differentiable."""
    return dense_weights(module, module.trained_names, origin="what is trained")


def run_with(part: nn.Module, values: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Return the output of a module with other tensors in place of its own; differentiable by them.

    Runs without ``torch.compile``, which would recompile for other tensors, or fail if they require gradients.

    Args:
        part: The module; unchanged.
        values: Parameters and buffers by name, without ``torch.compile``'s ``_orig_mod.``.
        images: A batch, ``(B, 3, H, W)``.
    """
    both = (*part.named_parameters(), *part.named_buffers())
    own = {name.replace(COMPILE_PREFIX, ""): name for name, _ in both}
    with torch.compiler.set_stance("force_eager"):
        output: Tensor = functional_call(part, {own[name]: value for name, value in values.items()}, (images,))
    return output


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """Concatenate all entries of the tensors into one detached vector, in the order of the mapping."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])


def named(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split a vector into views with the names and shapes of ``like``; the inverse of ``flat``."""
    parts = torch.split(vector, [tensor.numel() for tensor in like.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(like.items(), parts, strict=True)}


def regularized_logits(
    module: Classifier, regularizers: Sequence[Regularizer], images: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of a batch, and the term of every regularizer by name.

    Args:
        module: The classifier in training.
        regularizers: The regularizers of the loss.
        images: A batch, ``(B, 3, H, W)``.

    Raises:
        ValueError: If two regularizers both replace the weights of the loss.
    """
    chosen = [weights for one in regularizers if (weights := one.weights(module)) is not None]
    if len(chosen) > 1:
        raise ValueError(
            f"expected one regularizer that chooses the weights of the loss, got {len(chosen)}; give IEL only once"
        )
    if chosen:
        values = {name.removeprefix(BACKBONE): weight for name, weight in chosen[0].items()}
        features = run_with(module.backbone, values, images)
    else:
        features = module.backbone(images)
    step = LossStep(module, images, features, module.head(features))
    terms: dict[str, Tensor] = {}
    for one in regularizers:
        label = one.name if one.name not in terms else f"{one.name}_{len(terms)}"
        terms[label] = one.penalty(step)
    return step.logits, terms


def check_strength(strength: float, regularizer: str) -> float:
    """Return the strength of a regularizer.

    Raises:
        ValueError: If it is negative, NaN or infinite.
    """
    if not 0.0 <= strength < float("inf"):
        raise ValueError(f"expected a finite strength of 0 or more for {regularizer}, got {strength}")
    return float(strength)
