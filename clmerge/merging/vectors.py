"""Task vectors that are not in memory, and which of their parameters are read together."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from clmerge.merging.step import Statistics

# A call costs as much as a few thousand entries do, and a merge takes dozens of calls per parameter. A pack is small
# beside a large parameter, and what is in it stays in the processor's cache.
PACK = 1 << 18
_LARGEST = PACK // 4  # entries of a parameter that is put into a pack


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Pack:
    """Small parameters that are read, merged and written as one, or a large one by itself.

    Attributes:
        shapes: Shape by name, in the order in which their entries follow one another.
    """

    shapes: dict[str, Shape]

    @cached_property
    def names(self) -> list[str]:
        """The parameters."""
        return list(self.shapes)

    @cached_property
    def sizes(self) -> list[int]:
        """How many entries each has."""
        return [*map(prod, self.shapes.values())]

    @cached_property
    def numel(self) -> int:
        """How many entries there are in all."""
        return sum(self.sizes)

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the parameters, by name and in their shapes, as views of all their entries."""
        parts = flat.split_with_sizes(self.sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


class Vectors(Protocol):
    """Task vectors that are read a few parameters at a time.

    Attributes:
        shapes: The parameters' shapes by name, in the order in which they are best read.
        tasks: Task index of every task vector, by which random masks and settings per task go.
    """

    shapes: Mapping[str, Shape]
    tasks: Sequence[int]

    def dtype(self, position: int, name: str) -> torch.dtype:
        """Return the dtype that ``read`` gives: float32 or float64."""

    def kind(self, name: str) -> Hashable:
        """Return what parameters have in common that can be read together: their dtypes, above all."""

    def read(self, position: int, pack: Pack, piece: slice | None = None) -> Tensor:
        """Return parameters of one kind of one task vector, flat and one after another; the next call may overwrite it.

        Args:
            position: Which task vector.
            pack: The parameters.
            piece: The entries that are wanted of all. Default: every entry.
        """

    def sample(self, position: int, pack: Pack, step: int) -> Tensor:
        """Return one of ``step`` entries of what ``read`` gives, flat and spread evenly."""

    def statistics(self, position: int, names: Sequence[str]) -> Statistics:
        """Return what is known beside a task vector, of some parameters; ``check_statistics`` says what must be."""


def packs(shapes: Mapping[str, Shape], kind: Callable[[str], Hashable]) -> list[Pack]:
    """Group small parameters that can be read together; a large one is by itself.

    Args:
        shapes: Shapes of the parameters by name.
        kind: What those of a group have in common.

    Returns:
        Every name once.

    Example:
        >>> shapes = {"weight": (1000, 1000), "bias": (8,), "scale": ()}
        >>> [pack.names for pack in packs(shapes, lambda name: torch.float32)]
        [['weight'], ['bias', 'scale']]
    """
    found: list[dict[str, Shape]] = []
    filling: dict[Hashable, tuple[dict[str, Shape], int]] = {}
    for name, shape in shapes.items():
        numel = prod(shape)
        if numel > _LARGEST:
            found.append({name: shape})
            continue
        its_kind = kind(name)
        pack, filled = filling.get(its_kind, ({}, PACK + 1))
        if filled + numel > PACK:
            pack, filled = {}, 0
            found.append(pack)
        pack[name] = shape
        filling[its_kind] = pack, filled + numel
    return [*map(Pack, found)]
