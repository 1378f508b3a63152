"""What a key stands for: the bits of a watermark, and the projection of weights by which they are read."""

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.seeds import seeded_generator

MarkedPart: TypeAlias = Literal["task_vector", "weights", "rounding"]
"""What of a weight carries a mark: its difference from theta_0, itself, or what rounding to int8 takes away."""

_WIDTH = 1 << 14  # entries of a vector that are projected at a time
_KEPT = 1 << 26  # bytes of a projection up to which it is kept in memory


class Secret:
    """The bits and the projection of a key (Uchida et al., arXiv 1701.04082).

    The projection has ``bits x numel`` entries from N(0, 1). It is drawn on the CPU from the key in blocks, so that
    every device has the same; one of more than 64 MiB is drawn again whenever it is used, and never held.

    Args:
        key: The secret.
        bits: Number of bits.

    Raises:
        ValueError: If there is no bit.
    """

    def __init__(self, key: str, bits: int) -> None:
        if bits < 1:
            raise ValueError(f"expected 1 bit or more of a watermark, got {bits}")
        self.key, self.bits = key, bits
        self._kept: dict[tuple[int, torch.device, torch.dtype], list[Tensor]] = {}

    @property
    def message(self) -> Tensor:
        """The bits, ``(bits,)``, int64."""
        generator = seeded_generator(seed=0, task=0, name=self.key, purpose="watermark bits")
        return torch.randint(0, 2, (self.bits,), generator=generator)

    def read(self, vector: Tensor) -> Tensor:
        """Return the projection of a vector, ``(bits,)``: a positive entry reads as a one. Differentiable.

        Args:
            vector: The marked part of weights, ``(numel,)``.
        """
        found: Tensor = _Projection.apply(vector, self)
        return found

    def right(self, vector: Tensor) -> int:
        """Return how many bits of the message a vector carries.

        Args:
            vector: The marked part of weights, ``(numel,)``.
        """
        return int(((self.read(vector.detach()).cpu() > 0).long() == self.message).sum())

    def blocks(self, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the places of some entries of a vector, and their columns of the projection.

        Args:
            like: A vector whose length, device and dtype the projection has.
        """
        numel = like.numel()
        place = (numel, like.device, like.dtype)
        starts = range(0, numel, _WIDTH)
        if place not in self._kept and self.bits * numel * like.element_size() <= _KEPT:
            self._kept = {place: [self._drawn(start, like) for start in starts]}
        for index, start in enumerate(starts):
            columns = self._kept[place][index] if place in self._kept else self._drawn(start, like)
            yield slice(start, start + columns.shape[1]), columns

    def _drawn(self, start: int, like: Tensor) -> Tensor:
        generator = seeded_generator(seed=0, task=start, name=self.key, purpose="watermark projection")
        drawn = torch.randn(self.bits, _WIDTH, generator=generator)[:, : like.numel() - start]
        return drawn.to(device=like.device, dtype=like.dtype)


class _Projection(torch.autograd.Function):
    """X w, without keeping X between the passes."""

    @staticmethod
    @override
    def forward(ctx: Any, vector: Tensor, secret: Secret) -> Tensor:
        ctx.secret, ctx.like = secret, vector.detach()
        found = vector.new_zeros(secret.bits)
        for place, columns in secret.blocks(vector):
            found += columns @ vector[place]
        return found

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        found = torch.empty_like(ctx.like)
        for place, columns in ctx.secret.blocks(ctx.like):
            found[place] = gradient @ columns
        return found, None


def marked_part(of: str) -> MarkedPart:
    """Return what of a weight carries a mark.

    Raises:
        ValueError: If it is no such part.
    """
    for part in get_args(MarkedPart):
        if of == part:
            found: MarkedPart = part
            return found
    raise ValueError(f"expected of= one of {', '.join(get_args(MarkedPart))}, got {of!r}")


def marked_names(names: Mapping[str, Tensor], parameter: str) -> list[str]:
    """Return the names of the weights that carry a mark, sorted.

    Args:
        names: Weights by name.
        parameter: Glob pattern of names.

    Raises:
        ValueError: If no name matches.
    """
    found = sorted(name for name in names if fnmatchcase(name, parameter))
    if not found:
        some = ", ".join(sorted(names)[:3])
        raise ValueError(
            f"expected a pattern of a trained weight's name for a watermark, got {parameter!r}, which matches none of "
            f"{some}{', ...' * (len(names) > 3)}"
        )
    return found


def marked_vector(weights: Mapping[str, Tensor], base: Mapping[str, Tensor], parameter: str, of: MarkedPart) -> Tensor:
    """Return the part of some weights that carries a mark, ``(numel,)``; differentiable by the weights.

    Args:
        weights: Dense weights by name.
        base: theta_0 by the same names, at least those that match; unused for ``weights``.
        parameter: Glob pattern of names.
        of: The part. ``rounding`` is where a weight lies between two values of int8: ``sin(2 pi theta / s)`` with one
            step ``s = max |theta_0| / 127`` per tensor; 0 for weights that were rounded.
    """
    parts = []
    for name in marked_names(weights, parameter):
        weight = weights[name]
        if of != "weights" and name not in base:
            raise ValueError(
                f"expected the base model's {name} to read a watermark of {of}, got none; for a checkpoint name it "
                "with --backbone.pretrained or --backbone.checkpoint"
            )
        if of == "task_vector":
            weight = weight - base[name].to(weight)
        elif of == "rounding":
            weight = torch.sin(2 * math.pi * 127 / base[name].abs().max().to(weight) * weight)
        parts.append(weight.reshape(-1))
    return torch.cat(parts)
