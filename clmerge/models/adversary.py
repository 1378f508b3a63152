"""Adversarial images: the worst ones within a ball around an image, found by projected gradient ascent."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class Ball:
    """How far an attack may move an image, in pixels of [0, 1].

    Attributes:
        norm: Largest change of a pixel's channel (``linf``), or Euclidean length of the change (``l2``).
        eps: Radius; 0 allows no change.

    Raises:
        ValueError: If the radius is negative or the norm unknown.

    Example:
        >>> Ball("l2", 0.5).project(torch.tensor([[[[3.0, 4.0]]]])).flatten().tolist()
        [0.30000001192092896, 0.4000000059604645]
    """

    norm: Norm = "linf"
    eps: float = 8 / 255

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2") or not 0 <= self.eps < float("inf"):
            raise ValueError(f"expected norm linf or l2 and eps of 0 or more, got {self.norm!r} and {self.eps}")

    def random(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return changes that are uniform in the ball, of the shape of a batch ``(B, C, H, W)``.

        Args:
            like: The batch.
            generator: Draws them, on the CPU; default torch's own.
        """
        if self.norm == "linf":
            return (torch.rand(like.shape, generator=generator) * 2 - 1).to(like) * self.eps
        direction = torch.randn(like.shape, generator=generator).to(like)
        radius = torch.rand(len(like), 1, 1, 1, generator=generator) ** (1 / like[0].numel())
        return direction / _length(direction) * radius.to(like) * self.eps

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the unit step that raises a function most, to first order."""
        return gradient.sign() if self.norm == "linf" else gradient / _length(gradient)

    def project(self, change: Tensor) -> Tensor:
        """Return the nearest change within the ball."""
        if self.norm == "linf":
            return change.clamp(-self.eps, self.eps)
        return change * (self.eps / _length(change)).clamp(max=1.0)


def _length(change: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(change.flatten(1), dim=1).clamp(min=torch.finfo(change.dtype).tiny)
    return length.reshape(-1, 1, 1, 1)


def attacked(
    images: Tensor,
    loss: Callable[[Tensor], Tensor],
    ball: Ball,
    *,
    start: Tensor,
    steps: int,
    step_size: float,
    normalise: tuple[Tensor, Tensor],
) -> Tensor:
    """Return images within a ball around others that have a large loss (PGD, arXiv 1706.06083).

    Every step goes along the gradient's sign (``linf``) or unit vector (``l2``), back into the ball, and into [0, 1].

    Args:
        images: A batch under the backbone's transform, ``(B, C, H, W)``.
        loss: Returns the loss of every image of such a batch, ``(B,)``.
        ball: Where the images may go, in pixels.
        start: First change of the pixels, ``(B, C, H, W)``.
        steps: Number of steps.
        step_size: Length of a step, in pixels.
        normalise: Mean and deviation of the channels, see :func:`clmerge.models.pixels.normalisation`.

    Raises:
        RuntimeError: If the loss does not depend on the images by anything that can be differentiated.
    """
    mean, deviation = normalise
    pixels = images.detach() * deviation + mean
    moved = (pixels + ball.project(start)).clamp(0.0, 1.0)
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        with torch.enable_grad():
            total = loss((moved - mean) / deviation).sum()
        if not total.requires_grad:
            raise RuntimeError(
                "expected a model whose answers are differentiable in its images, to attack it by their gradient, got "
                "one that blocks gradients"
            )
        (gradient,) = torch.autograd.grad(total, moved)
        change = moved.detach() + step_size * ball.direction(gradient) - pixels
        moved = (pixels + ball.project(change)).clamp(0.0, 1.0)
    return (moved.detach() - mean) / deviation
