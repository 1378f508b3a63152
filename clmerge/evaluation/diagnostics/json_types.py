"""From tensors and NaN to what JSON can hold."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def to_json(value: Any) -> Any:
    """Turn tensors into lists and numbers that are not finite into None, at any depth.

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
