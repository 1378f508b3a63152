"""The barrier between two sets of weights, by the features that they compute."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clmerge.weights import State
from clmerge.weights.modes import eval_mode


@torch.no_grad()
def barrier(module: nn.Module, first: State, second: State, batches: Iterable[Tensor]) -> float:
    """Return how far the features midway between two networks are from the mean of theirs, as a share of it.

    It is 0 for networks that are linearly connected layer by layer (Zhou et al., arXiv 2307.08286), and near 1 where
    the network in the middle computes something else. No labels, classes or heads are needed.

    Args:
        module: Their architecture; its forward pass gives features ``(B, D)``.
        first: Weights and buffers of one network; what is missing is the module's own.
        second: Those of the other; running statistics are averaged, too.
        batches: Images.

    Raises:
        ValueError: If there are no images.
    """
    names = [name for name in first if name in second and first[name].is_floating_point()]
    middle = {name: torch.lerp(first[name], second[name].to(first[name]), 0.5) for name in names}
    device = next(module.parameters()).device
    apart = size = 0.0
    with eval_mode(module):
        for images in batches:
            inputs = images.to(device)
            ours, theirs, found = (
                functional_call(module, dict(weights), (inputs,)).double() for weights in (first, second, middle)
            )
            mean = (ours + theirs) / 2
            apart += float((found - mean).square().sum())
            size += float(mean.square().sum())
    if not size:
        raise ValueError("expected images on which the networks compute something, got none")
    return math.sqrt(apart / size)
