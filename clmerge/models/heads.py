"""Heads from features to logits over all classes of a stream; heads are never merged."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from clmerge.models.backbone import Backbone


class Head(nn.Module, ABC):
    """From features ``(B, D)`` to logits ``(B, C)`` over the ``C`` classes of the whole stream.

    Logits of classes that the head does not know yet are ``-inf``.

    Attributes:
        open_vocabulary: Whether the head knows every class before it is trained (text heads do).
        wants_prototypes: Whether ``add_classes`` needs the mean feature of every new class.
    """

    open_vocabulary: ClassVar[bool] = False
    wants_prototypes: ClassVar[bool] = False

    @abstractmethod
    def build(self, backbone: Backbone, num_classes: int, prompts: Sequence[Sequence[str]]) -> None:
        """Prepare for a stream of ``num_classes`` classes, described by ``prompts`` for open-vocabulary heads."""

    def add_classes(self, classes: Sequence[int], prototypes: Tensor | None = None) -> None:
        """Grow by the new ones among ``classes``; ``prototypes`` of shape ``(len(classes), D)`` where wanted."""

    def train_newest_only(self, newest_only: bool) -> None:
        """Freeze the weights of earlier tasks' classes, or train them all."""

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Return logits of shape ``(B, C)``."""


class ZeroShotHead(Head):
    """Frozen text embeddings of the class names, as CLIP classifies without training (arXiv:2103.00020).

    Every prompt's embedding is normalised, averaged over a class's prompts and normalised again; logits are cosine
    similarities times the model's own logit scale.

    Attributes:
        weight: Buffer of shape ``(C, D)``, logit scale included.
    """

    open_vocabulary: ClassVar[bool] = True
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0, 0))

    @torch.no_grad()
    def build(self, backbone: Backbone, num_classes: int, prompts: Sequence[Sequence[str]]) -> None:
        """Embed the prompts of every class with the backbone's text tower as it is now."""
        if len(prompts) != num_classes:
            raise ValueError(f"expected prompts for {num_classes} classes, got them for {len(prompts)}")
        rows = []
        for class_prompts in prompts:
            embedded = functional.normalize(backbone.encode_text(class_prompts).float(), dim=-1)
            rows.append(functional.normalize(embedded.mean(dim=0), dim=-1))
        self.weight = torch.stack(rows) * backbone.logit_scale()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        self.weight = torch.empty_like(state_dict[f"{prefix}weight"], device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits of shape ``(B, C)``."""
        return functional.normalize(features, dim=-1) @ self.weight.to(features.dtype).T


class _GrowingHead(Head):
    """One block of weights per task, scattered into the stream's classes."""

    known: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ParameterList()
        self.register_buffer("known", torch.empty(0, dtype=torch.long))
        self._num_classes = 0
        self._feature_dim = 0

    def build(self, backbone: Backbone, num_classes: int, prompts: Sequence[Sequence[str]]) -> None:
        """Take the number of classes and of features; prompts are not used."""
        self._num_classes = num_classes
        self._feature_dim = backbone.feature_dim

    def train_newest_only(self, newest_only: bool) -> None:
        """Freeze the weights of earlier tasks' classes, or train them all."""
        for i, block in enumerate(self.blocks):
            block.requires_grad_(not newest_only or i == len(self.blocks) - 1)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # A checkpoint may know more classes than this head does: grow to its size first.
        self.known = torch.empty_like(state_dict[f"{prefix}known"], device=self.known.device)
        while (key := f"{prefix}blocks.{len(self.blocks)}") in state_dict:
            self.blocks.append(nn.Parameter(torch.empty_like(state_dict[key], device=self.known.device)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _grow(self, classes: Sequence[int], rows: Tensor) -> None:
        """Append ``rows`` of shape ``(len(classes), ...)`` for the classes that are new."""
        known = set(self.known.tolist())
        fresh = [i for i, c in enumerate(classes) if c not in known]
        if fresh:
            device = self.known.device
            self.blocks.append(nn.Parameter(rows[fresh].to(device)))
            self.known = torch.cat([self.known, torch.tensor([classes[i] for i in fresh], device=device)])

    def _scatter(self, logits: Tensor) -> Tensor:
        full = logits.new_full((logits.shape[0], self._num_classes), float("-inf"))
        return full.index_copy(1, self.known, logits)


class LinearHead(_GrowingHead):
    """A linear classifier that grows by one block of rows (weights and bias) per task.

    Blocks of earlier tasks get no gradient while the loss runs over the current classes, and none of the optimizer's
    weight decay either.
    """

    def add_classes(self, classes: Sequence[int], prototypes: Tensor | None = None) -> None:
        """Grow by the new ones among ``classes``, with PyTorch's initialisation of a linear layer."""
        layer = nn.Linear(self._feature_dim, len(classes))
        self._grow(classes, torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits of shape ``(B, C)``."""
        rows = torch.cat(list(self.blocks))
        return self._scatter(functional.linear(features, rows[:, :-1].to(features.dtype), rows[:, -1].to(features.dtype)))


class CosineHead(_GrowingHead):
    """Cosine similarity to one prototype per class, started at the class means of the task's training features.

    Args:
        logit_scale: Factor from cosine similarity to logits.
        trainable: Whether prototypes are trained further, or stay class means.
    """

    wants_prototypes: ClassVar[bool] = True

    def __init__(self, *, logit_scale: float = 20.0, trainable: bool = True) -> None:
        super().__init__()
        self.logit_scale = logit_scale
        self.trainable = trainable

    def add_classes(self, classes: Sequence[int], prototypes: Tensor | None = None) -> None:
        """Grow by the new ones among ``classes``, whose mean features are the rows of ``prototypes``."""
        if prototypes is None:
            raise ValueError("expected prototypes of shape (classes, features) for a CosineHead, got none")
        self._grow(classes, functional.normalize(prototypes, dim=-1))

    def train_newest_only(self, newest_only: bool) -> None:
        """Freeze the prototypes of earlier tasks' classes, or train them all, if they are trained at all."""
        super().train_newest_only(newest_only)
        if not self.trainable:
            self.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits of shape ``(B, C)``."""
        prototypes = functional.normalize(torch.cat(list(self.blocks)), dim=-1).to(features.dtype)
        return self._scatter(functional.normalize(features, dim=-1) @ prototypes.T * self.logit_scale)
