"""How much of a task vector a rule looks at: one parameter at a time, or the whole model."""

from typing import Any, ClassVar, Literal

Scope = Literal["entry", "parameter", "model"]


class Scoped:
    """Base of mergers, sparsifiers and finishers: they say whether parameters can be merged one by one.

    Attributes:
        scope: ``"entry"`` if what happens to an entry depends on that entry alone, whatever parameter it is in;
            ``"parameter"`` if what happens to a parameter depends on that parameter alone, so that a model can be
            merged one parameter at a time; ``"model"`` otherwise. A class that overrides one of the functions that see
            the whole model counts as ``"model"`` until it says otherwise.
    """

    scope: Scope = "parameter"
    _sees_model: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Take a class that looks at the whole model for one that needs it."""
        super().__init_subclass__(**kwargs)
        if "scope" not in cls.__dict__ and cls._sees_model & cls.__dict__.keys():
            cls.scope = "model"


def widest(*parts: Scoped | None) -> Scope:
    """Return the scope of a rule that is made of parts: ``"model"`` if any part's is.

    Example:
        >>> from clmerge.merging import MagMax, TrimModel
        >>> widest(MagMax(), None), widest(MagMax(), TrimModel())
        ('parameter', 'model')
    """
    return "model" if any(part is not None and part.scope == "model" for part in parts) else "parameter"
