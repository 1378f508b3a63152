"""Sparsifiers: keep part of a task vector's entries and set the others to zero."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.blocks import blocks
from clmerge.merging.checks import checked_choice
from clmerge.merging.scope import Scope, Scoped
from clmerge.merging.threshold import Threshold, kth_largest_magnitude, kth_largest_of_each
from clmerge.seeds import seeded_uniform
from clmerge.settings import Configured
from clmerge.weights.task_vector import State, TaskVector, accumulator_dtype

Rescale = Literal["probability", "l1", "none"]


def keep_from(tau: Tensor, threshold: float) -> Tensor:
    """Keep the entries whose magnitude is at least ``threshold``.

    Args:
        tau: Any shape, float32 or float64.
        threshold: Smallest magnitude that is kept, exact in ``tau``'s dtype.

    Returns:
        A fresh tensor with zeros in place of the other entries.

    Example:
        >>> keep_from(torch.tensor([1.0, -2.0, 3.0]), 2.0)
        tensor([ 0., -2.,  3.])
    """
    if threshold <= 0:
        return tau.clone()
    # hardshrink keeps what is larger than its bound, so the bound is the next smaller number. It works on
    # blocks much faster than a comparison and torch.where do.
    return torch.hardshrink(tau, _next_smaller(threshold, tau.dtype))


def _next_smaller(value: float, dtype: torch.dtype) -> float:
    number = np.float64 if dtype == torch.float64 else np.float32
    return float(np.nextafter(number(value), number(0)))


def keep_largest(tau: Tensor, threshold: Threshold) -> Tensor:
    """Keep exactly the k entries of largest magnitude, for the k that the threshold was computed for.

    Between entries of equal magnitude the first in memory order are kept.

    Args:
        tau: Any shape, float32 or float64.
        threshold: The result of ``kth_largest_magnitude`` for ``tau``.

    Returns:
        A fresh tensor with zeros in place of the other entries.

    Example:
        >>> tau = torch.tensor([2.0, 1.0, -2.0, 3.0])
        >>> keep_largest(tau, kth_largest_magnitude([tau], k=2))
        tensor([2., 0., 0., 3.])
    """
    kept = keep_from(tau.reshape(-1), threshold.value)
    if threshold.surplus and threshold.value > 0:
        _drop_last(kept, threshold)
    return kept.view(tau.shape)


def keep_largest_each(tau: Tensor, sizes: Sequence[int], thresholds: Sequence[Threshold]) -> Tensor:
    """Apply ``keep_largest`` to parameters that lie one after the other.

    Args:
        tau: Their entries, flat, float32 or float64.
        sizes: Number of entries of each.
        thresholds: Threshold of each.

    Example:
        >>> keep_largest_each(torch.tensor([1.0, 2.0, -5.0, 9.0]), [2, 2], [Threshold(2.0, 0), Threshold(9.0, 0)])
        tensor([0., 2., 0., 9.])
    """
    if len(sizes) == 1:
        return keep_largest(tau, thresholds[0])
    bounds = torch.tensor([one.value for one in thresholds], dtype=tau.dtype).to(tau.device)
    of_entries = bounds.repeat_interleave(torch.tensor(sizes).to(tau.device), output_size=tau.numel())
    kept = torch.where(tau.abs() >= of_entries, tau, torch.zeros_like(bounds[0]))
    for part, one in zip(kept.split_with_sizes(list(sizes)), thresholds, strict=True):
        if one.surplus and one.value > 0:
            _drop_last(part, one)
    return kept


def _drop_last(kept: Tensor, threshold: Threshold) -> None:
    """Set the last ``surplus`` entries whose magnitude equals the threshold to zero, in place."""
    left = threshold.surplus
    for (piece,) in reversed(list(blocks(kept))):
        equal = _equal(piece.abs(), threshold.value)
        dropped = equal[max(len(equal) - left, 0) :]
        piece[dropped] = 0
        left -= len(dropped)
        if not left:
            return


def _equal(magnitudes: Tensor, value: float) -> Tensor:
    """Return the indices of the entries that equal ``value``."""
    if magnitudes.device.type == "cpu":  # NumPy compares and searches flags of one byte several times as fast
        return torch.from_numpy(np.flatnonzero(magnitudes.numpy() == value))
    return (magnitudes == value).nonzero().squeeze(1)


def drop_entries(tau: Tensor, uniform: Tensor, drop_rate: float, rescale: Rescale) -> Tensor:
    """Drop the entries whose uniform number is below ``drop_rate`` and rescale the others.

    Args:
        tau: Any shape, floating-point.
        uniform: Numbers in [0, 1), same shape.
        drop_rate: Expected share of dropped entries.
        rescale: ``"probability"`` divides the kept entries by ``1 - drop_rate``; ``"l1"`` scales them to the L1 norm
            of ``tau``; ``"none"`` leaves them unchanged.

    Returns:
        A fresh tensor with zeros in place of the dropped entries.

    Example:
        >>> drop_entries(torch.tensor([1.0, 2.0]), torch.tensor([0.3, 0.7]), 0.5, "probability")
        tensor([0., 4.])
    """
    kept = torch.ge(uniform, drop_rate, out=torch.empty_like(uniform)).to(tau.dtype).mul_(tau)
    if rescale == "probability":
        return kept.div_(1 - drop_rate)
    if rescale == "l1":
        rest = float(kept.abs().sum(dtype=torch.float64))
        return kept.mul_(float(tau.abs().sum(dtype=torch.float64)) / rest) if rest else kept
    return kept


class Sparsifier(Configured, Scoped, ABC):
    """Set part of a task vector's entries to zero, before any reducer.

    It needs only one task vector at a time, so it can always be streamed.
    """

    scope: Scope = "parameter"
    _sees_model = frozenset({"plan", "__call__"})

    def plan(self, vector: State, task: int) -> Any:
        """Compute whole-vector quantities, such as a threshold; by default nothing.

        Args:
            vector: The task vector.
            task: Index of its task.
        """
        return None

    @abstractmethod
    def sparsify(self, name: str, tau: Tensor, task: int, plan: Any) -> Tensor:
        """Sparsify one parameter.

        Args:
            name: Name of the parameter.
            tau: Its tensor in the task vector, float32 or float64; not changed.
            task: Index of the task.
            plan: The result of ``plan``.

        Returns:
            The sparse tensor, same shape and dtype.
        """

    def __call__(self, vector: State, task: int = 0) -> TaskVector:
        """Sparsify a whole task vector.

        Args:
            vector: The task vector.
            task: Index of its task, which seeds random sparsifiers.
        """
        plan = self.plan(vector, task)
        return {name: self.sparsify(name, vector[name], task, plan) for name in vector}


class Sparsified(Mapping[str, Tensor]):
    """A task vector whose parameters are sparsified on access, one at a time.

    Args:
        vector: The task vector.
        sparsifier: The sparsifier to apply.
        task: Index of its task.
    """

    def __init__(self, vector: State, sparsifier: Sparsifier, task: int) -> None:
        self.vector = vector
        self._sparsifier = sparsifier
        self._task = task

    @cached_property
    def _plan(self) -> Any:
        return self._sparsifier.plan(self.vector, self._task)

    @override
    def __getitem__(self, name: str) -> Tensor:
        tau = self.vector[name].detach()
        return self._sparsifier.sparsify(name, tau.to(accumulator_dtype(tau)), self._task, self._plan)

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.vector)

    @override
    def __len__(self) -> int:
        return len(self.vector)


class TrimModel(Sparsifier):
    """Keep the largest entries of the whole model, by one threshold (TIES' trim, arXiv 2306.01708).

    The threshold is that of the released code: with d entries, the ``d - int(density * d)``-th smallest magnitude.
    Entries equal to the threshold are kept, so a vector without ties keeps ``int(density * d) + 1`` entries.

    Args:
        density: Share of the entries that is kept, in (0, 1]; 1 keeps everything.
    """

    name = "trim_model"
    scope: Scope = "thresholds"

    def __init__(self, density: float = 0.2) -> None:
        self.density = checked_density(density)
        self._known: Mapping[int, float] | None = None

    @override
    def threshold_rank(self, total: int) -> int:
        return int(self.density * total) + 1

    @override
    def with_thresholds(self, thresholds: Mapping[int, float]) -> Self:
        known = copy(self)
        known._known, known.scope = thresholds, "entry"
        return known

    @override
    def plan(self, vector: State, task: int) -> float:
        if self._known is not None:
            return self._known[task]
        total = sum(vector[name].numel() for name in vector)
        count = self.threshold_rank(total)
        return kth_largest_magnitude([vector[name] for name in vector], count).value if count <= total else 0.0

    @override
    def sparsify(self, name: str, tau: Tensor, task: int, plan: float) -> Tensor:
        return keep_from(tau, plan)


class TrimTensor(Sparsifier):
    """Keep exactly ``max(1, int(density * n))`` of every tensor's n entries, as mergekit does (PEFT may keep none).

    Between entries of equal magnitude the first in memory order are kept.

    Args:
        density: Share of the entries that is kept, in (0, 1]; 1 keeps everything.
    """

    name = "trim_tensor"
    scope = "parameter"

    def __init__(self, density: float = 0.2) -> None:
        self.density = checked_density(density)

    @override
    def plan(self, vector: State, task: int) -> dict[str, Threshold]:
        return kth_largest_of_each(vector, lambda numel: max(1, int(self.density * numel)))

    @override
    def sparsify(self, name: str, tau: Tensor, task: int, plan: dict[str, Threshold]) -> Tensor:
        return keep_largest(tau, plan[name])


class RandomDrop(Sparsifier):
    """Drop entries at random and rescale the others (DARE, arXiv 2311.03099).

    The mask depends only on seed, task and parameter name.

    Args:
        drop_rate: Share of the entries that is dropped, in [0, 1).
        rescale: ``"probability"`` divides what is kept by ``1 - drop_rate`` (the paper); ``"l1"`` restores
            each tensor's L1 norm (mergekit); ``"none"`` does neither (the released code without its rescale
            flag).
        seed: Seed of the masks.
    """

    name = "random_drop"

    def __init__(self, drop_rate: float = 0.9, *, rescale: Rescale = "probability", seed: int = 0) -> None:
        if not 0 <= drop_rate < 1:
            raise ValueError(f"expected drop_rate in [0, 1), got {drop_rate}")
        self.drop_rate = drop_rate
        self.rescale: Rescale = checked_choice("rescale", rescale, Rescale)
        self.seed = seed

    @override
    def sparsify(self, name: str, tau: Tensor, task: int, plan: None) -> Tensor:
        uniform = seeded_uniform(tau, seed=self.seed, task=task, name=name, purpose="drop")
        return drop_entries(tau, uniform, self.drop_rate, self.rescale)


def checked_density(density: float) -> float:
    """Return ``density``, or raise a ValueError if it is not in (0, 1]."""
    if not 0 < density <= 1:
        raise ValueError(f"expected density as a share in (0, 1], got {density}; 20 % is 0.2")
    return density
