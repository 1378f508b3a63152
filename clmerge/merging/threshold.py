"""Select the k-th largest magnitude of one or many tensors, exactly and without a sort."""

from collections.abc import Sequence

import torch
from torch import Tensor


def kth_largest_magnitude(tensors: Sequence[Tensor], k: int) -> float:
    """Return the k-th largest absolute value over all tensors together.

    Args:
        tensors: Tensors of any shape, floating-point and finite.
        k: Rank from the top, from 1 to the number of entries.

    Raises:
        ValueError: If there is no such rank.

    Example:
        >>> kth_largest_magnitude([torch.tensor([1.0, -5.0]), torch.tensor([[3.0]])], k=2)
        3.0
    """
    total = sum(tensor.numel() for tensor in tensors)
    if not 1 <= k <= total:
        raise ValueError(f"expected a rank between 1 and the {total} entries, got {k}")
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).abs()
    return flat.kthvalue(total - k + 1).values.item()
