"""Names of classes in the plain values that files carry beside weights."""

from collections.abc import Mapping, Sequence
from typing import Any

_KEYS = ("classes", "class_names", "class_to_idx", "id2label", "label_names")


def names_in(content: Mapping[Any, Any]) -> list[str]:
    """Return the names of classes in a mapping such as a checkpoint's or a configuration; none if it has none.

    Known are lists under ``classes``, ``class_names`` and ``label_names``, and ``class_to_idx`` and ``id2label``.

    Example:
        >>> names_in({"class_to_idx": {"dog": 1, "cat": 0}})
        ['cat', 'dog']
    """
    for key in _KEYS:
        found = content.get(key)
        if isinstance(found, Mapping):
            pairs = [(index, name) if key == "class_to_idx" else (name, index) for name, index in found.items()]
            found = in_order(pairs)
        if isinstance(found, list) and found and all(isinstance(name, str) for name in found):
            return found
    return []


def in_order(pairs: Sequence[tuple[Any, Any]]) -> list[str]:
    """Return names by their indices; none if these are not 0, 1 and so on."""
    try:
        found = {int(index): name for index, name in pairs}
    except (TypeError, ValueError):
        return []
    if sorted(found) != [*range(len(pairs))] or not all(isinstance(name, str) for name in found.values()):
        return []
    return [found[index] for index in range(len(found))]
