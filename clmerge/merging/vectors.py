"""Task vectors that are read from disk, and packs of parameters that are read together."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from clmerge.merging.step import Statistics

# A call costs as much as a few thousand entries, and a merge takes dozens of calls per parameter. A pack is small
# compared with a large parameter, and its content stays in the processor's cache.
PACK = 1 << 18


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Pack:
    """Small parameters that are read, merged and written as one, or a large one by itself.

    Attributes:
        shapes: Shape by name, in the order of the concatenated entries.
    """

    shapes: dict[str, Shape]

    @cached_property
    def names(self) -> list[str]:
        """Names of the parameters."""
        return list(self.shapes)

    @cached_property
    def sizes(self) -> list[int]:
        """Number of entries of each parameter."""
        return [*map(prod, self.shapes.values())]

    @cached_property
    def numel(self) -> int:
        """Total number of entries."""
        return sum(self.sizes)

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the parameters by name, in their shapes, as views of the concatenated entries."""
        parts = flat.split_with_sizes(self.sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


class Vectors(Protocol):
    """Task vectors that are read a few parameters at a time.

    Attributes:
        shapes: Shapes of the parameters by name, in the most efficient order of reading.
        tasks: Task index of every task vector; it selects random masks and per-task settings.
    """

    shapes: Mapping[str, Shape]
    tasks: Sequence[int]

    def dtype(self, position: int, name: str) -> torch.dtype:
        """Return the dtype of the tensors that ``read`` returns: float32 or float64."""

    def kind(self, name: str) -> Hashable:
        """Return a key, such as the dtypes; parameters with equal keys can be read together."""

    def read(self, position: int, pack: Pack, piece: slice | None = None) -> Tensor:
        """Return parameters of one task vector, flat and concatenated; the next call may overwrite the result.

        Args:
            position: Position of the task vector.
            pack: The parameters, all of one ``kind``.
            piece: Range of the concatenated entries to return. Default: every entry.
        """

    def sample(self, position: int, pack: Pack, step: int) -> Tensor:
        """Return one of ``step`` entries of the result of ``read``, flat and evenly spaced."""

    def statistics(self, position: int, names: Sequence[str]) -> Statistics:
        """Return the statistics of a task vector for these parameters; ``check_statistics`` names required ones."""


def packs(shapes: Mapping[str, Shape], kind: Callable[[str], Hashable], size: int = PACK) -> list[Pack]:
    """Group small parameters that can be read together; each large parameter is its own group.

    Args:
        shapes: Shapes of the parameters by name.
        kind: Returns a key per name; parameters of a group have equal keys.
        size: Most entries of a group of several parameters; one with more than a quarter of them is alone.

    Returns:
        Packs that together hold every name once.

    Example:
        >>> shapes = {"weight": (1000, 1000), "bias": (8,), "scale": ()}
        >>> [pack.names for pack in packs(shapes, lambda name: torch.float32)]
        [['weight'], ['bias', 'scale']]
    """
    found: list[dict[str, Shape]] = []
    filling: dict[Hashable, tuple[dict[str, Shape], int]] = {}
    for name, shape in shapes.items():
        numel = prod(shape)
        if numel > size // 4:
            found.append({name: shape})
            continue
        its_kind = kind(name)
        pack, filled = filling.get(its_kind, ({}, size + 1))
        if filled + numel > size:
            pack, filled = {}, 0
            found.append(pack)
        pack[name] = shape
        filling[its_kind] = pack, filled + numel
    return [*map(Pack, found)]
