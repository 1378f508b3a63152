"""Convert tensors and NaN to values that JSON can represent."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def to_json(value: Any) -> Any:
    """Convert tensors to lists, and non-finite numbers to None, at any depth.

    Example:
        >>> import torch
        >>> to_json({"a": torch.tensor([1.0, float("nan")])})
        {'a': [1.0, None]}
    """
    if isinstance(value, Tensor):
        return to_json(value.tolist())
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
