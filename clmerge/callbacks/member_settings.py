"""What tells the members of a population apart: settings of the optimizer, and augmentation of their images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from clmerge.streams.splits import derived_seed


def own_settings(
    optimizer: Optimizer, settings: Sequence[Mapping[str, float]], current: Callable[[], int | None]
) -> list[RemovableHandle]:
    """Let every step of an optimizer use the settings of the member that takes it; between steps they are its own.

    Args:
        optimizer: The optimizer of all members.
        settings: Settings of every member, such as ``{"lr": 2e-4}``; a learning rate is scaled as a schedule scales the
            optimizer's.
        current: Returns the member that takes the step, None before there are members.

    Returns:
        Hooks to remove when the fit ends.

    Raises:
        ValueError: If the optimizer has no such setting.
    """
    for group in optimizer.param_groups:
        for own in settings:
            if unknown := next((name for name in own if name not in group), None):
                raise ValueError(
                    f"expected a setting of {type(optimizer).__name__}, one of {sorted(group.keys() - {'params'})}, "
                    f"got {unknown!r}"
                )
    full = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    shared: list[dict[str, Any]] = []

    def before(*_: Any) -> None:
        member = current()
        if member is None:
            return
        for group, rate in zip(optimizer.param_groups, full, strict=True):
            own = settings[member]
            shared.append({name: group[name] for name in own})
            scheduled = group["lr"] / rate if rate else 1.0
            group.update({name: value * scheduled if name == "lr" else value for name, value in own.items()})

    def after(*_: Any) -> None:
        if shared:
            for group, own in zip(optimizer.param_groups, shared, strict=True):
                group.update(own)
        shared.clear()

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


@torch.no_grad()
def augment(batch: Any, steps: Sequence[Callable[[Tensor], Tensor]], *, seed: int) -> None:
    """Change the images of a batch in place, each by draws of its own.

    Args:
        batch: A list or tuple that begins with the images, ``(B, ...)``.
        steps: Transforms from an image to an image of the same shape, one after another.
        seed: Seed of the draws of this batch; global random state stays as it is.

    Raises:
        ValueError: If the batch does not begin with images, or a transform changes their shape.
    """
    if not (isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor) and batch[0].ndim > 1):
        raise ValueError(f"expected a batch that begins with its images for augmentations, got {type(batch).__name__}")
    with torch.random.fork_rng(devices=[]):
        for position, image in enumerate(batch[0]):
            torch.manual_seed(derived_seed(seed, position))
            changed = image
            for step in steps:
                changed = step(changed)
            if changed.shape != image.shape:
                raise ValueError(
                    f"expected augmentations that keep the shape {tuple(image.shape)} of an image, got "
                    f"{tuple(changed.shape)} from {list(steps)}"
                )
            image.copy_(changed)
