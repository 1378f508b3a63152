"""Distil finished classifiers of any architecture into the one in training, so that they can be merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from PIL.Image import Image, fromarray
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from clmerge.checkpoints import open_checkpoint
from clmerge.models import Backbone, Classifier, Head, ZeroShotHead
from clmerge.models.backbone import Transform
from clmerge.training.regularizers.regularizer import LossStep, Regularizer, check_strength
from clmerge.weights.modes import eval_mode

_LINEAR = ("", "head.", "fc.", "classifier.", "head.fc.")


@dataclass
class Teacher:
    """A finished classifier, of any architecture.

    Args:
        backbone: Its image encoder, with its weights.
        head: File with its linear classifier: ``weight`` of shape (classes, features) and, if it has one, ``bias``,
            alone or below ``head.``, ``fc.`` or ``classifier.``. Default: its text tower reads the stream's prompts.
        classes: Which of the stream's classes its rows are, by their ids. Default: all, in order.
    """

    backbone: Backbone
    head: str | None = None
    classes: list[int] = field(default_factory=list)


class Distillation(Regularizer):
    """Learn what other classifiers say of the images (arXiv 1503.02531), whatever their architecture is.

    ``strength * T^2 * CE(mean of softmax(teacher/T), softmax(student/T))`` over the classes that compete in the loss
    and that all of the teachers know; no term where there are fewer than two. The teachers get the images of the
    student, resized and normalised as they expect them. Nothing is kept; cost: a forward pass per teacher and step.

    Args:
        teachers: The classifiers.
        strength: Factor of the term.
        temperature: Temperature of all softmaxes.

    Raises:
        ValueError: Without teachers, for a negative strength, or a temperature that is not positive.
    """

    name: ClassVar[str] = "distillation"

    def __init__(self, teachers: Sequence[Teacher], *, strength: float = 1.0, temperature: float = 2.0) -> None:
        super().__init__()
        if not teachers:
            raise ValueError("expected teachers for Distillation, got none")
        if not temperature > 0:
            raise ValueError(f"expected a positive temperature, got {temperature}")
        self.strength = check_strength(strength, "Distillation")
        self.temperature = temperature
        self._teachers = [_Running(teacher) for teacher in teachers]  # a list: no part of the module's state

    @override
    def begin_stream(self, module: Classifier, num_classes: int, prompts: Sequence[Sequence[str]]) -> None:
        for teacher in self._teachers:
            teacher.begin(module.backbone.eval_transform, num_classes, prompts)

    @override
    def penalty(self, step: LossStep) -> Tensor:
        known = set.intersection(*(set(teacher.classes) for teacher in self._teachers))
        columns = [label for label in step.module.competing(step.logits.shape[1]) if label in known]
        if len(columns) < 2:
            return step.logits.new_zeros(())
        told = [
            (teacher(step.images)[:, [teacher.classes.index(label) for label in columns]] / self.temperature).softmax(1)
            for teacher in self._teachers
        ]
        target = torch.stack(told).mean(0)
        loss = functional.cross_entropy(step.logits[:, columns] / self.temperature, target)
        return self.strength * self.temperature**2 * loss


class _Running:
    """A teacher, and how it sees the images of a student."""

    def __init__(self, teacher: Teacher) -> None:
        self.classes = list(teacher.classes)
        self._file, self._backbone = teacher.head, teacher.backbone.requires_grad_(False)
        self._head: nn.Module = nn.Identity()
        self._size: tuple[int, int] = (0, 0)
        self._scale = self._shift = torch.empty(0)

    def begin(self, student: Transform, num_classes: int, prompts: Sequence[Sequence[str]]) -> None:
        """Build the classifier, and what turns the student's images into the teacher's."""
        if self._file is None and not prompts:
            raise ValueError(
                "expected the file of a linear classifier as `head` of a teacher, got none: the student's head reads "
                "no prompts, which the teacher's text tower could read"
            )
        if self._file is None:
            head: Head = ZeroShotHead()
            head.build(self._backbone, num_classes, prompts)
            self._head, rows = head, num_classes
        else:
            self._head, rows = _linear(self._file, self._backbone.feature_dim)
        self.classes = self.classes or list(range(num_classes))
        wrong = [label for label in self.classes if not 0 <= label < num_classes]
        if wrong or len(set(self.classes)) != len(self.classes) or len(self.classes) != rows:
            raise ValueError(
                f"expected one of the stream's {num_classes} classes for each of the {rows} rows of a teacher, got "
                f"{self.classes}: give its `classes` by their ids in the stream"
            )
        theirs, own = _range_of(self._backbone.eval_transform), _range_of(student)
        self._size = theirs.size
        self._scale = (theirs.white - theirs.black) / (own.white - own.black)
        self._shift = theirs.black - own.black * self._scale

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return logits of images that were prepared for the student."""
        device = images.device
        self._backbone.to(device)
        self._head.to(device)
        seen = images.float() * self._scale.to(device) + self._shift.to(device)
        if tuple(seen.shape[-2:]) != self._size:
            seen = functional.interpolate(seen, size=self._size, mode="bicubic", antialias=True)
        with eval_mode(self._backbone):
            found: Tensor = self._head(self._backbone(seen).float())
        return found


@dataclass
class _Range:
    """What a transform makes of black and of white, ``(3, 1, 1)``, and the size of its images."""

    black: Tensor
    white: Tensor
    size: tuple[int, int]


def _range_of(transform: Transform) -> _Range:
    def seen(value: int) -> Tensor:
        image: Image = fromarray(np.full((64, 64, 3), value, dtype=np.uint8))
        return transform(image)

    black, white = seen(0), seen(255)
    size = int(black.shape[-2]), int(black.shape[-1])
    return _Range(black.mean((1, 2))[:, None, None], white.mean((1, 2))[:, None, None], size)


def _linear(file: str, width: int) -> tuple[nn.Linear, int]:
    """Return the linear classifier in a file, and its number of classes."""
    found: Any = open_checkpoint(file)
    for prefix in _LINEAR:
        name = f"{prefix}weight"
        if name in found and found.entries[name].shape[1:] == (width,):
            weight, bias = found.tensor(name), found.tensor(f"{prefix}bias") if f"{prefix}bias" in found else None
            linear = nn.Linear(width, len(weight), bias=bias is not None).requires_grad_(False)
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
            return linear, len(weight)
    raise ValueError(
        f"expected a linear classifier of {width} features in {file}, got none: a tensor of shape (classes, {width}) "
        f"under {', '.join(prefix + 'weight' for prefix in _LINEAR)}"
    )
