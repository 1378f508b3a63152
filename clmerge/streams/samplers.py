"""Samplers whose orders are pure functions of (seed, task, epoch), on any number of processes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from clmerge.streams.splits import derived_seed


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """Shuffle anew every epoch and yield ``(epoch, position)``.

    A `DistributedSampler` even on one process: Lightning passes it the epoch, so the order does not depend on state
    that a restart would lose. With the epoch in the key, worker processes can seed augmentations.

    Args:
        data: anything with a length.
        seed: seed of the order, already specific to the task.
        num_replicas: number of processes.
        rank: index of this process.
    """

    def __init__(self, data: Sized, *, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(
            cast("Dataset[Any]", data),
            num_replicas=num_replicas,
            rank=rank,
            shuffle=True,
            seed=seed,
            drop_last=False,
        )

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for position in super().__iter__():
            yield self.epoch, cast("int", position)


class BalancedSampler(EpochSampler):
    """Draw equally many samples of every class anew every epoch and yield ``(epoch, position)``.

    An epoch is as long as without. Of a class with many samples it has a random part, others in every epoch; those of a
    class with few are gone through as often as needed, each as often as the others up to one. Class counts in an epoch
    differ by one at most.

    Args:
        targets: class id of every sample.
        seed: seed of the order, already specific to the task.
        num_replicas: number of processes.
        rank: index of this process.

    Example:
        >>> sampler = BalancedSampler([0, 0, 0, 0, 0, 1], seed=0)
        >>> sorted(int(position == 5) for _, position in sampler)
        [0, 0, 0, 1, 1, 1]
    """

    def __init__(self, targets: Sequence[int], *, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(targets, seed=seed, num_replicas=num_replicas, rank=rank)
        by_class: dict[int, list[int]] = {}
        for position, target in enumerate(targets):
            by_class.setdefault(target, []).append(position)
        self._classes = [torch.tensor(by_class[target]) for target in sorted(by_class)]

    @override
    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "balanced", self.epoch))
        share, left = divmod(self.total_size, len(self._classes))
        drawn: list[Tensor] = []
        for place, index in enumerate(torch.randperm(len(self._classes), generator=generator).tolist()):
            positions = self._classes[index]
            missing = share + (place < left)
            while missing > 0:
                some = positions[torch.randperm(len(positions), generator=generator)[:missing]]
                drawn.append(some)
                missing -= len(some)
        chosen = torch.cat(drawn)[torch.randperm(self.total_size, generator=generator)]
        yield from ((self.epoch, position) for position in chosen[self.rank :: self.num_replicas].tolist())


class ShardSampler(DistributedSampler[int]):
    """Traverse the data in order, each sample on exactly one process.

    PyTorch's own sampler repeats samples until all processes have equally many, which biases an accuracy.
    This one is a `DistributedSampler` by type only, so that Lightning leaves it in place.

    Args:
        data: anything with a length.
        num_replicas: number of processes.
        rank: index of this process.

    Example:
        >>> [list(ShardSampler(range(5), num_replicas=2, rank=rank)) for rank in range(2)]
        [[0, 2, 4], [1, 3]]
    """

    def __init__(self, data: Sized, *, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(cast("Dataset[Any]", data), num_replicas=num_replicas, rank=rank, shuffle=False)
        self._positions = range(rank, len(data), num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)


def even_steps_batch_size(num_samples: int, batch_size: int, num_replicas: int) -> int:
    """Return the largest batch size up to ``batch_size`` at which every process takes equally many steps.

    With sharded weights a process that takes one step more than the others waits for them for ever. Shards differ by
    one sample, so a slightly smaller batch size makes the numbers of steps equal.

    Args:
        num_samples: size of the whole set.
        batch_size: the requested batch size.
        num_replicas: number of processes.

    Raises:
        ValueError: if there are fewer samples than processes.

    Example:
        >>> even_steps_batch_size(9, 4, 2)  # shards of 5 and 4: two steps and one with batches of 4
        3
    """
    if num_samples < num_replicas:
        raise ValueError(f"expected at least one image per process, got {num_samples} for {num_replicas} processes")
    largest, smallest = -(-num_samples // num_replicas), num_samples // num_replicas
    for size in range(batch_size, 1, -1):
        if -(-largest // size) == -(-smallest // size):
            return size
    return 1 if largest == smallest else largest


@contextmanager
def seeded_rng(seed: int) -> Iterator[None]:
    """Seed the CPU generators of torch, NumPy and Python during the block, and restore their states afterwards.

    Args:
        seed: any non-negative integer.
    """
    saved = torch.get_rng_state(), random.getstate(), np.random.get_state()
    # Not torch.manual_seed: it would also seed the GPU generators, whose states could not be restored.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(saved[0])
        random.setstate(saved[1])
        np.random.set_state(saved[2])


class SeededDataset(Dataset[Any]):
    """Draw random transforms from a generator seeded by (seed, epoch, first sample of the batch).

    The same batch gets the same augmentation with any number of workers and after a resume, and loading data does not
    change the random state of the training process.

    Args:
        dataset: the images; its transform may be random.
        seed: seed of the augmentations, already specific to the task.
    """

    def __init__(self, dataset: Dataset[Any], *, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(cast("Sized", self.dataset))

    def __getitem__(self, key: tuple[int, int] | int) -> object:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int] | int]) -> list[object]:
        """Load one batch; PyTorch's fetcher looks for this name. Plain positions belong to epoch 0."""
        pairs = [key if isinstance(key, tuple) else (0, key) for key in keys]
        with seeded_rng(derived_seed(self.seed, "augment", *pairs[0])):
            return [self.dataset[position] for _, position in pairs]
