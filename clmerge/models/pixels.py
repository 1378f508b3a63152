"""Between pixels in [0, 1] and what a backbone's transform makes of them."""

from typing import Any

import torch
from torch import Tensor


def normalisation(transform: Any) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation by which a transform normalises channels, ``(channels, 1, 1)`` each.

    Args:
        transform: A backbone's transform for evaluation, such as torchvision's ``Compose`` with a ``Normalize``; 0 and
            1 if there is none in it.

    Example:
        >>> from torchvision.transforms import Compose, Normalize, ToTensor
        >>> [each.flatten().tolist() for each in normalisation(Compose([ToTensor(), Normalize([0.5], [0.25])]))]
        [[0.5], [0.25]]
    """
    steps = [transform]
    while steps:
        step = steps.pop(0)
        mean, deviation = getattr(step, "mean", None), getattr(step, "std", None)
        if mean is not None and deviation is not None:
            return torch.as_tensor(mean).reshape(-1, 1, 1), torch.as_tensor(deviation).reshape(-1, 1, 1)
        steps += [*(getattr(step, "transforms", None) or ())]
    return torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
