"""Task vectors that are not in memory, and which of their parameters are read together."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from clmerge.merging.step import Statistics

# A call costs as much as a few thousand entries do, and a merge takes dozens of calls per parameter. A pack is small
# beside a large parameter, and what is in it stays in the processor's cache.
PACK = 1 << 18
_LARGEST = PACK // 4  # entries of a parameter that is put into a pack


class Vectors(Protocol):
    """Task vectors that are read a few parameters at a time.

    Attributes:
        names: The parameters, in the order in which they are best read.
        num_tasks: How many task vectors there are.
    """

    names: Sequence[str]
    num_tasks: int

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""

    def dtype(self, task: int, name: str) -> torch.dtype:
        """Return the dtype that ``read`` gives: float32 or float64."""

    def kind(self, name: str) -> Hashable:
        """Return what parameters have in common that can be read together: their dtypes, above all."""

    def read(self, task: int, names: Sequence[str], piece: slice | None = None) -> Tensor:
        """Return parameters of one kind of one task vector, flat and one after another; the next call may overwrite it.

        Args:
            task: Which task vector.
            names: The parameters.
            piece: The entries that are wanted of all. Default: every entry.
        """

    def sample(self, task: int, names: Sequence[str], step: int) -> Tensor:
        """Return one of ``step`` entries of what ``read`` gives, flat and spread evenly."""

    def statistics(self, task: int, names: Sequence[str]) -> Statistics:
        """Return what is known beside a task vector, of some parameters; ``check_statistics`` says what must be."""


def packs(
    names: Iterable[str], shape: Callable[[str], tuple[int, ...]], kind: Callable[[str], Hashable]
) -> list[list[str]]:
    """Group small parameters that can be read together; a large one is by itself.

    Args:
        names: The parameters.
        shape: Their shapes.
        kind: What those of a group have in common.

    Returns:
        Every name once.

    Example:
        >>> shapes = {"weight": (1000, 1000), "bias": (8,), "scale": ()}
        >>> packs(shapes, shapes.__getitem__, lambda name: torch.float32)
        [['weight'], ['bias', 'scale']]
    """
    found: list[list[str]] = []
    filling: dict[Hashable, tuple[list[str], int]] = {}
    for name in names:
        numel = prod(shape(name))
        if numel > _LARGEST:
            found.append([name])
            continue
        its_kind = kind(name)
        pack, filled = filling.get(its_kind, ([], PACK + 1))
        if filled + numel > PACK:
            pack, filled = [], 0
            found.append(pack)
        pack.append(name)
        filling[its_kind] = pack, filled + numel
    return found
