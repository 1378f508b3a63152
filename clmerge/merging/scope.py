"""How much of a task vector a rule needs at once: one entry, one parameter, or the whole model."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self

Scope = Literal["entry", "parameter", "thresholds", "model"]


class Tally(NamedTuple):
    """What a piece of the merged model adds to a sum over the whole model, and whether reading it depends on that sum.

    Attributes:
        votes: The piece's part of the sum.
        is_open: Whether the piece reads differently for different sums.
    """

    votes: int = 0
    is_open: bool = False


class Scoped:
    """Base of mergers, sparsifiers and finishers: declares whether parameters can be merged one by one.

    Attributes:
        scope: ``"entry"`` if the result of an entry depends on that entry alone, whatever parameter it is in, and at
            most on a ``Tally``; ``"parameter"`` if the result of a parameter depends on that parameter alone, so that a
            model can be merged one parameter at a time; ``"thresholds"`` if one of these holds as soon as one
            magnitude of every whole task vector is known; ``"model"`` otherwise. A class that overrides one of the
            functions that see the whole model has scope ``"model"`` unless it sets another.
    """

    scope: Scope = "parameter"
    _sees_model: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Set scope ``"model"`` for a class that overrides a function that sees the whole model."""
        super().__init_subclass__(**kwargs)
        if "scope" not in cls.__dict__ and cls._sees_model & cls.__dict__.keys():
            cls.scope = "model"

    def threshold_rank(self, total: int) -> int:
        """Return which magnitude of a task vector a part of scope ``"thresholds"`` needs: its rank from the top.

        Args:
            total: Number of entries of the model. If the rank exceeds it, the threshold is 0.

        Raises:
            TypeError: If the part has another scope.
        """
        raise TypeError(f"expected a part of scope 'thresholds', got {self!r} of scope {self.scope!r}")

    def with_thresholds(self, thresholds: Mapping[int, float]) -> Self:
        """Return a part of scope ``"thresholds"`` with the thresholds known, in the scope that it then has.

        Args:
            thresholds: The magnitude of rank ``threshold_rank`` in every whole task vector, by task index.

        Raises:
            TypeError: If the part has another scope.
        """
        raise TypeError(f"expected a part of scope 'thresholds', got {self!r} of scope {self.scope!r}")


def widest(*parts: Scoped | None) -> Scope:
    """Return the scope of a rule made of several parts: ``"model"`` if any part needs to know more than a parameter.

    Example:
        >>> from clmerge.merging import MagMax, TrimModel
        >>> widest(MagMax(), None), widest(MagMax(), TrimModel())
        ('parameter', 'model')
    """
    return "model" if any(part is not None and part.scope in ("thresholds", "model") for part in parts) else "parameter"
