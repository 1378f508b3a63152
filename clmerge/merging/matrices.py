"""Which parameters spectral rules treat as matrices."""

import re
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import Tensor

from clmerge.merging.checks import Shapes

_FUSED = ("in_proj_weight", "qkv.weight")  # nn.MultiheadAttention and open_clip; timm


class Matrices:
    """Which parameters a spectral rule decomposes, and into how many matrices each.

    A parameter with two dimensions and at least one entry is a matrix, unless the patterns say otherwise; spectral
    rules average everything else. The choice changes results, and the reference implementations make it silently:

    - open_clip, timm and ``nn.MultiheadAttention`` keep query, key and value in one fused parameter of shape
      ``(3 d, d)``, which the reference code decomposes as one matrix; checkpoints of Hugging Face hold three. With
      ``split_qkv`` a fused parameter counts as three matrices.
    - ``positional_embedding`` and CLIP's ``visual.proj`` (stored as inputs x outputs) have two dimensions too, and the
      reference code decomposes them. It leaves out ``text_projection``: ``exclude=["*text_projection"]`` does that.

    Args:
        include: Glob patterns over parameter names, of which at least one must match. Default: every name.
        exclude: Glob patterns of which none may match.
        split_qkv: Whether a fused query-key-value weight is three matrices.

    Example:
        >>> matrices = Matrices(exclude=["embed*"], split_qkv=True)
        >>> matrices.listed({"embed": (9, 4), "qkv.weight": (12, 4), "fc.0.weight": (8, 4), "fc.1.weight": (8, 4)})
        ['qkv.weight: 3 x (4, 4)', 'fc.*.weight: (8, 4), 2 times']
    """

    def __init__(
        self, include: Sequence[str] | None = None, exclude: Sequence[str] = (), *, split_qkv: bool = False
    ) -> None:
        self.include = None if include is None else list(include)
        self.exclude = list(exclude)
        self.split_qkv = split_qkv

    def check(self, shapes: Shapes) -> None:
        """Raise a ValueError that names a pattern no matrix matches, and the nearest names.

        Args:
            shapes: Shapes of all parameters by name.
        """
        names = [name for name, shape in shapes.items() if _is_matrix(shape)]
        for pattern in [*(self.include or []), *self.exclude]:
            if not any(fnmatchcase(name, pattern) for name in names):
                close = get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
                nearest = f"the nearest are {', '.join(map(repr, close))}" if close else "there is no matrix"
                raise ValueError(
                    f"expected a pattern that matches a parameter of two dimensions, got {pattern!r}; {nearest}"
                )

    def count(self, name: str, shape: tuple[int, ...]) -> int:
        """Return into how many matrices a parameter is split: 0 if it is not treated as one, 1, or 3.

        Args:
            name: Name of the parameter.
            shape: Its shape.
        """
        if not _is_matrix(shape) or any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return 0
        if self.include is not None and not any(fnmatchcase(name, pattern) for pattern in self.include):
            return 0
        fused = shape[0] == 3 * shape[1] and name.endswith(_FUSED)
        return 3 if self.split_qkv and fused else 1

    def pieces(self, name: str, tensor: Tensor) -> list[Tensor]:
        """Return the matrices of a parameter, as views: none, one or three of them.

        Args:
            name: Name of the parameter.
            tensor: The parameter, or anything of its shape.
        """
        count = self.count(name, tuple(tensor.shape))
        return list(tensor.chunk(count)) if count else []

    def by_matrix(self, name: str, taus: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return, for every matrix of a parameter, that matrix of every task, in float64.

        Args:
            name: Name of the parameter.
            taus: The parameter in the task vectors.
        """
        by_task = [self.pieces(name, tau) for tau in taus]
        return [[piece.double() for piece in pieces] for pieces in zip(*by_task, strict=True)]

    def listed(self, shapes: Shapes) -> list[str]:
        """Return lines that say which parameters are treated as matrices; names that differ in numbers share a line.

        Args:
            shapes: Shapes of all parameters by name.
        """
        found: Counter[str] = Counter()
        for name, shape in shapes.items():
            if count := self.count(name, shape):
                size = f"{shape}" if count == 1 else f"{count} x {(shape[0] // count, shape[1])}"
                found[f"{re.sub(r'(?<![^.])[0-9]+(?![^.])', '*', name)}: {size}"] += 1
        return [line if times == 1 else f"{line}, {times} times" for line, times in found.items()]


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and min(shape) > 0
