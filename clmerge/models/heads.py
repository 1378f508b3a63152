"""Heads from features to logits over all classes of a stream; heads are never merged."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from clmerge.models.backbone import Backbone
from clmerge.weights.modes import eval_mode


class Head(nn.Module, ABC):
    """Maps features ``(B, D)`` to logits ``(B, C)`` over the ``C`` classes of the whole stream.

    Logits of classes that the head does not know yet are ``-inf``.

    Attributes:
        open_vocabulary: Whether the head knows every class before it is trained (text heads do).
        wants_prototypes: Whether ``add_classes`` needs the mean feature of every new class.
    """

    open_vocabulary: ClassVar[bool] = False
    wants_prototypes: ClassVar[bool] = False

    @abstractmethod
    def build(self, backbone: Backbone, num_classes: int, prompts: Sequence[Sequence[str]]) -> None:
        """Prepare for a stream.

        Args:
            backbone: The image encoder whose features the head will get.
            num_classes: Number of classes ``C`` of the whole stream.
            prompts: One list of prompts per class; used by open-vocabulary heads only.
        """

    def add_classes(self, classes: Sequence[int], prototypes: Tensor | None = None) -> None:
        """Add the new classes among ``classes``.

        Args:
            classes: Global class ids of the task.
            prototypes: Mean features of these classes, of shape ``(len(classes), D)``, if ``wants_prototypes``.
        """

    def train_blocks(self, classes: Sequence[int] | None) -> None:
        """Train the blocks of tasks with any of these classes and freeze the others; None trains all."""

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Return logits of shape ``(B, C)``."""


class ZeroShotHead(Head):
    """Frozen text embeddings of the class names, as CLIP classifies without training (arXiv:2103.00020).

    Every prompt's embedding is normalised, averaged over a class's prompts and normalised again; logits are
    cosine similarities times the model's own logit scale.

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
        """Embed the prompts of every class with the backbone's current text tower.

        Raises:
            ValueError: If there is not at least one prompt for each of the ``num_classes`` classes.
            TypeError: If the backbone has no text tower.
        """
        if len(prompts) != num_classes:
            raise ValueError(f"expected prompts for {num_classes} classes, got them for {len(prompts)}")
        if empty := [c for c, class_prompts in enumerate(prompts) if not class_prompts]:
            raise ValueError(f"expected a prompt for every class, got none for class {empty[0]}")
        rows = []
        with eval_mode(backbone):  # some text towers have dropout
            for class_prompts in prompts:
                embedded = functional.normalize(backbone.encode_text(class_prompts).float(), dim=-1)
                rows.append(functional.normalize(embedded.mean(dim=0), dim=-1))
        self.weight = torch.stack(rows) * backbone.logit_scale()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if (saved := state_dict.get(f"{prefix}weight")) is not None:
            self.weight = torch.empty_like(saved, device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits of shape ``(B, C)``."""
        return functional.normalize(features, dim=-1) @ self.weight.to(features.dtype).T


class _GrowingHead(Head):
    """A head with one block of weights per task, whose rows are scattered to the stream's classes."""

    known: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ParameterList()
        self.register_buffer("known", torch.empty(0, dtype=torch.long))
        self._num_classes = 0
        self._feature_dim = 0

    @property
    def num_classes(self) -> int:
        """Number of classes of the whole stream; 0 before ``build``."""
        return self._num_classes

    def build(self, backbone: Backbone, num_classes: int, prompts: Sequence[Sequence[str]]) -> None:
        """Set the numbers of classes and features; prompts are not used."""
        self._num_classes = num_classes
        self._feature_dim = backbone.feature_dim

    def train_blocks(self, classes: Sequence[int] | None) -> None:
        """Train the blocks of tasks with any of these classes and freeze the others; None trains all."""
        start = 0
        for block in self.blocks:
            own = self.known[start : start + len(block)].tolist()
            block.requires_grad_(classes is None or not set(classes).isdisjoint(own))
            start += len(block)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # A checkpoint may know more classes than this head does: grow to its size first.
        if (saved := state_dict.get(f"{prefix}known")) is not None:
            self.known = torch.empty_like(saved, device=self.known.device)
        while (key := f"{prefix}blocks.{len(self.blocks)}") in state_dict:
            self.blocks.append(nn.Parameter(torch.empty_like(state_dict[key], device=self.known.device)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check(self, classes: Sequence[int]) -> None:
        if wrong := [c for c in classes if not 0 <= c < self._num_classes]:
            raise ValueError(
                f"expected classes of the stream, in [0, {self._num_classes}), got {wrong[0]}; "
                "build the head for the whole stream first"
            )

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

    def _rows(self, features: Tensor, width: int) -> Tensor:
        """Return all blocks stacked along the rows, ``(known classes, width)``; no rows before the first task."""
        return torch.cat([features.new_empty(0, width, dtype=torch.float32), *self.blocks])


class LinearHead(_GrowingHead):
    """A linear classifier that grows by one block of rows (weights and bias) per task.

    If the loss covers the current classes only, blocks without any of them get neither gradients nor weight decay.
    Classes of an earlier task keep their rows.
    """

    def add_classes(self, classes: Sequence[int], prototypes: Tensor | None = None) -> None:
        """Add the new classes among ``classes``, with PyTorch's initialisation of a linear layer.

        Args:
            classes: Global class ids of the task.
            prototypes: Not used.

        Raises:
            ValueError: For a class that the stream does not have.
        """
        self._check(classes)
        layer = nn.Linear(self._feature_dim, len(classes))
        self._grow(classes, torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits of shape ``(B, C)``."""
        rows = self._rows(features, features.shape[1] + 1).to(features.dtype)
        return self._scatter(functional.linear(features, rows[:, :-1], rows[:, -1]))


class CosineHead(_GrowingHead):
    """Cosine similarity to one prototype per class, initialised with the class means of the training features.

    The means are of normalised features, computed with the weights at the start of the task. Classes of an
    earlier task keep their prototypes.

    Args:
        logit_scale: Factor from cosine similarity to logits.
        trainable: Whether prototypes are trained; otherwise they stay class means.
    """

    wants_prototypes: ClassVar[bool] = True

    def __init__(self, *, logit_scale: float = 20.0, trainable: bool = True) -> None:
        super().__init__()
        self.logit_scale = logit_scale
        self.trainable = trainable

    def add_classes(self, classes: Sequence[int], prototypes: Tensor | None = None) -> None:
        """Add the new classes among ``classes``, with the rows of ``prototypes``.

        Args:
            classes: Global class ids of the task.
            prototypes: Mean features of these classes, of shape ``(len(classes), D)``.

        Raises:
            ValueError: Without prototypes of that shape, or for a class that the stream does not have.
        """
        self._check(classes)
        if prototypes is None or prototypes.shape != (len(classes), self._feature_dim):
            expected = (len(classes), self._feature_dim)
            got = "none" if prototypes is None else f"shape {tuple(prototypes.shape)}"
            raise ValueError(f"expected prototypes of shape {expected} for a CosineHead, got {got}")
        self._grow(classes, functional.normalize(prototypes, dim=-1))

    def train_blocks(self, classes: Sequence[int] | None) -> None:
        """As for every growing head, but nothing is trained if ``trainable`` is False."""
        super().train_blocks(classes)
        if not self.trainable:
            self.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits of shape ``(B, C)``."""
        prototypes = functional.normalize(self._rows(features, features.shape[1]), dim=-1).to(features.dtype)
        return self._scatter(functional.normalize(features, dim=-1) @ prototypes.T * self.logit_scale)
