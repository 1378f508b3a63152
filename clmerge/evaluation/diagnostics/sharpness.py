"""How much the loss rises when weights are disturbed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clmerge.evaluation.diagnostics.behaviour import Observer
from clmerge.weights import State


def average_sharpness(
    observer: Observer,
    weights: State,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    loss: float,
    classes: Sequence[int] | None = None,
    radius: float = 0.05,
    draws: int = 3,
    seed: int = 0,
) -> float:
    """Return the mean rise of the loss under Gaussian noise in proportion to each weight (arXiv 2302.07011).

    ``E[L(w + radius |w| z)] - L(w)`` with standard normal ``z``: adaptive, so that rescaling weights without changing
    the function leaves it as it is. The paper finds at most a weak correlation with generalisation.

    Args:
        observer: Runs the classifier.
        weights: The model's weights by the module's names.
        batches: Images and global labels.
        loss: The loss of the undisturbed model on them.
        classes: Global ids of the competing classes. Default: all that the head knows.
        radius: Standard deviation of the noise, as a share of each weight.
        draws: Number of draws.
        seed: Seed of the noise, equal for all models, so that they are disturbed alike.
    """
    total = 0.0
    for draw in range(draws):
        generator = torch.Generator().manual_seed(seed + draw)
        disturbed = {
            name: tensor + radius * tensor.abs() * torch.randn(tensor.shape, generator=generator).to(tensor)
            for name, tensor in sorted(weights.items())
        }
        total += observer(disturbed, batches, classes).loss
    return total / draws - loss
