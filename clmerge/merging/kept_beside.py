"""State that a rule keeps in addition to its per-parameter accumulators: numbers, tensors, dictionaries of them."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Join = Literal["sum"] | Callable[[Any, Any], Any] | None
"""How the values of two accumulators are joined: added, by a function, or not at all (None)."""


def duplicate(value: Any, device: torch.device | None = None) -> Any:
    """Return a deep copy.

    Args:
        value: A number, a string, a tensor, or a dictionary or list of such.
        device: Device of the copied tensors; None means the device of the originals.

    Example:
        >>> duplicate({"count": 2, "sums": {"w": torch.ones(2)}})
        {'count': 2, 'sums': {'w': tensor([1., 1.])}}
    """
    if isinstance(value, dict):
        return {key: duplicate(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [duplicate(item, device) for item in value]
    if isinstance(value, Tensor):
        with torch.inference_mode(False):
            return value.detach().to(device or value.device, copy=True)
    return value


def added(ours: Any, theirs: Any) -> Any:
    """Return the entrywise sum of two values; a name that only one of them has keeps its value.

    Args:
        ours: A number, a tensor, or a dictionary of such.
        theirs: A value of the same kind; it is not changed.

    Example:
        >>> added({"a": 1, "b": 2}, {"a": 10, "c": 5})
        {'a': 11, 'b': 2, 'c': 5}
    """
    if isinstance(ours, dict):
        both = {key: added(item, theirs[key]) if key in theirs else item for key, item in ours.items()}
        return both | {key: duplicate(item) for key, item in theirs.items() if key not in ours}
    return ours + (theirs.to(ours.device) if isinstance(ours, Tensor) else theirs)
