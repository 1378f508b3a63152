"""How much of a task vector a rule needs at once: one entry, one parameter, or the whole model."""

from typing import Any, ClassVar, Literal

Scope = Literal["entry", "parameter", "model"]


class Scoped:
    """Base of mergers, sparsifiers and finishers: declares whether parameters can be merged one by one.

    Attributes:
        scope: ``"entry"`` if the result of an entry depends on that entry alone, whatever parameter it is in;
            ``"parameter"`` if the result of a parameter depends on that parameter alone, so that a model can be
            merged one parameter at a time; ``"model"`` otherwise. A class that overrides one of the functions that see
            the whole model has scope ``"model"`` unless it sets another.
    """

    scope: Scope = "parameter"
    _sees_model: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Set scope ``"model"`` for a class that overrides a function that sees the whole model."""
        super().__init_subclass__(**kwargs)
        if "scope" not in cls.__dict__ and cls._sees_model & cls.__dict__.keys():
            cls.scope = "model"


def widest(*parts: Scoped | None) -> Scope:
    """Return the scope of a rule made of several parts: ``"model"`` if any part has scope ``"model"``.

    Example:
        >>> from clmerge.merging import MagMax, TrimModel
        >>> widest(MagMax(), None), widest(MagMax(), TrimModel())
        ('parameter', 'model')
    """
    return "model" if any(part is not None and part.scope == "model" for part in parts) else "parameter"
