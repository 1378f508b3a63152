"""What the members of a population take from each other while they train."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.streams.splits import derived_seed
from clmerge.training.trajectory import Weights, mean_of


class ExchangeRule(ABC):
    """A rule by which the weights of several members change each other; used by ``Population``."""

    @abstractmethod
    def exchange(self, members: Sequence[Weights], *, step: int, rate: float, seed: int) -> None:
        """Change the members' weights in place.

        Args:
            members: Weights of every member, with the same names.
            step: Optimizer steps taken by the fit.
            rate: The learning rate as a share of the largest one so far.
            seed: Seed of random exchanges.
        """


class Average(ExchangeRule):
    """All members become their mean: Lookaround (arXiv 2306.07684), DART (arXiv 2302.14685), PAPA-all."""

    @override
    def exchange(self, members: Sequence[Weights], *, step: int, rate: float, seed: int) -> None:
        mean = mean_of(members)
        for member in members:
            for name, tensor in member.items():
                tensor.copy_(mean[name])


class Pull(ExchangeRule):
    """Every member moves towards the mean: PAPA (Jolicoeur-Martineau et al., arXiv 2304.03094).

    ``theta_m <- a theta_m + (1 - a) mean``, so that the mean stays and the deviations from it are multiplied by ``a``.

    Args:
        alpha: The share ``a`` that stays, from 0 to 1; 0.99 from scratch as published.
        follow_rate: Whether ``1 - a`` is multiplied by the learning rate's share of its largest value, as published.

    Raises:
        ValueError: If ``alpha`` is out of range.
    """

    def __init__(self, alpha: float = 0.99, *, follow_rate: bool = True) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"expected alpha from 0 to 1, got {alpha}")
        self.alpha, self.follow_rate = alpha, follow_rate

    @override
    def exchange(self, members: Sequence[Weights], *, step: int, rate: float, seed: int) -> None:
        share = (1 - self.alpha) * (rate if self.follow_rate else 1.0)
        if not share:
            return
        mean = mean_of(members)
        for member in members:
            for name, tensor in member.items():
                tensor.copy_(tensor.to(mean[name].dtype).lerp(mean[name], share))


class Shuffle(ExchangeRule):
    """Random coordinates are permuted among the members: WASH (Fournier et al., arXiv 2405.17517).

    Every coordinate keeps its set of values, so that the mean of the members, and the sum of their squared distances
    from it, stay as they are. The draws are a function of seed, step and parameter name.

    Args:
        p: Probability with which a coordinate is permuted.
        by_depth: Whether the probability falls linearly from ``p`` in the first parameter to 0 in the last, as
            published.

    Raises:
        ValueError: If ``p`` is out of range.
    """

    def __init__(self, p: float = 0.001, *, by_depth: bool = True) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"expected p from 0 to 1, got {p}")
        self.p, self.by_depth = p, by_depth

    @override
    def exchange(self, members: Sequence[Weights], *, step: int, rate: float, seed: int) -> None:
        names = list(members[0])
        for position, name in enumerate(names):
            share = self.p * (1 - position / (len(names) - 1) if self.by_depth and len(names) > 1 else 1.0)
            if share:
                generator = torch.Generator().manual_seed(derived_seed(seed, "shuffle", step, name))
                _permute([member[name] for member in members], share, generator)


class Keep(ExchangeRule):
    """Members train apart until the end: late-phase weights (von Oswald et al., arXiv 2007.12927), or a soup."""

    @override
    def exchange(self, members: Sequence[Weights], *, step: int, rate: float, seed: int) -> None:
        return


def _permute(tensors: Sequence[Tensor], share: float, generator: torch.Generator) -> None:
    """Permute a random share of the coordinates among tensors of one shape, in place."""
    device, shape = tensors[0].device, tensors[0].shape
    chosen = (torch.rand(shape, generator=generator) < share).to(device).flatten()
    number = int(chosen.sum())
    if not number:
        return
    order = torch.rand((len(tensors), number), generator=generator).argsort(0).to(device)
    before = torch.stack([tensor.reshape(-1)[chosen] for tensor in tensors])
    after = before.gather(0, order)
    for tensor, values in zip(tensors, after, strict=True):
        flat = tensor.flatten()
        flat[chosen] = values
        tensor.copy_(flat.view(shape))
