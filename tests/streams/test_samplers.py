import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from clmerge.streams.samplers import (
    BalancedSampler,
    EpochSampler,
    SeededDataset,
    ShardSampler,
    even_steps_batch_size,
    seeded_rng,
)


class Noise(Dataset):
    """Every item draws from the three global generators."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index, float(torch.rand(())), random.random(), float(np.random.rand())


def draws(loader):
    return [tuple(tensor.tolist()) for batch in loader for tensor in batch]


@given(st.integers(1, 60), st.integers(1, 3))
def test_shards_cover_every_sample_once(num_samples, world_size):
    shards = [ShardSampler(range(num_samples), num_replicas=world_size, rank=rank) for rank in range(world_size)]
    assert sorted(i for shard in shards for i in shard) == list(range(num_samples))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_order_covers_every_sample_on_any_number_of_processes(world_size):
    samplers = [EpochSampler(range(10), seed=1, num_replicas=world_size, rank=rank) for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(2)
    keys = [key for sampler in samplers for key in sampler]
    assert {epoch for epoch, _ in keys} == {2}
    assert {position for _, position in keys} == set(range(10))
    assert len(keys) == -(-10 // world_size) * world_size


def test_training_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = EpochSampler(range(50), seed=seed)
        sampler.set_epoch(epoch)
        return [position for _, position in sampler]

    assert order(1, 3) == order(1, 3)
    assert order(1, 3) != order(1, 4)
    assert order(1, 3) != order(2, 3)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 3), st.integers(0, 3))
def test_a_balanced_epoch_has_equally_many_of_every_class(sizes, world_size, epoch):
    targets = [10 * index for index, size in enumerate(sizes) for _ in range(size)]
    keys = []
    for rank in range(world_size):
        sampler = BalancedSampler(targets, seed=3, num_replicas=world_size, rank=rank)
        sampler.set_epoch(epoch)
        own = list(sampler)
        assert len(own) == len(sampler) == -(-len(targets) // world_size)
        keys += own
    assert {number for number, _ in keys} == {epoch}
    counts = Counter(targets[position] for _, position in keys)
    assert set(counts) == set(targets) or len(keys) < len(sizes)
    assert max(counts.values()) - min(counts.values()) <= 1
    times = Counter(position for _, position in keys)
    for target in counts:  # within a class, every image as often as every other, up to one
        own = [times[position] for position, other in enumerate(targets) if other == target]
        assert max(own) - min(own) <= 1


def test_a_balanced_order_is_a_function_of_seed_and_epoch_on_any_number_of_processes():
    targets = [0] * 90 + [1] * 9 + [2]

    def order(seed, epoch, world_size=1):
        parts = []
        for rank in range(world_size):
            sampler = BalancedSampler(targets, seed=seed, num_replicas=world_size, rank=rank)
            sampler.set_epoch(epoch)
            parts.append([position for _, position in sampler])
        return [position for step in zip(*parts, strict=True) for position in step]

    assert order(1, 3) == order(1, 3) == order(1, 3, 2) == order(1, 3, 4)
    assert order(1, 3) != order(1, 4)
    assert order(1, 3) != order(2, 3)
    many = {position for epoch in range(20) for position in order(1, epoch)}
    assert many == set(range(100)), "no image of a large class is left out for ever"


def test_lightning_leaves_both_samplers_in_place():
    assert issubclass(EpochSampler, DistributedSampler)
    assert issubclass(ShardSampler, DistributedSampler)


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 4))
def test_every_process_takes_equally_many_steps(num_samples, batch_size, world_size):
    if num_samples < world_size:
        with pytest.raises(ValueError, match="at least one image per process"):
            even_steps_batch_size(num_samples, batch_size, world_size)
        return
    size = even_steps_batch_size(num_samples, batch_size, world_size)
    steps = {-(-len(range(rank, num_samples, world_size)) // size) for rank in range(world_size)}
    assert len(steps) == 1
    if world_size == 1:
        assert size == batch_size


def test_generators_are_seeded_and_put_back():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with seeded_rng(5):
        first = Noise()[0]
    with seeded_rng(5):
        assert Noise()[0] == first
    with seeded_rng(6):
        assert all(a != b for a, b in zip(Noise()[0][1:], first[1:], strict=True))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


def test_generators_are_put_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded_rng(5):
        raise KeyError(float(torch.rand(())))
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_does_not_depend_on_workers_or_history():
    def loader(num_workers):
        sampler = EpochSampler(range(10), seed=1)
        sampler.set_epoch(1)
        data = SeededDataset(Noise(), seed=3)
        return DataLoader(data, batch_size=4, sampler=sampler, num_workers=num_workers, generator=torch.Generator())

    alone = draws(loader(0))
    torch.rand(7)
    assert draws(loader(0)) == alone
    assert draws(loader(2)) == alone


def test_augmentation_differs_between_epochs_and_seeds():
    def values(seed, epoch):
        return SeededDataset(Noise(), seed=seed)[(epoch, 4)][1:]

    assert values(1, 0) == values(1, 0)
    assert values(1, 0) != values(1, 1)
    assert values(1, 0) != values(2, 0)
    assert SeededDataset(Noise(), seed=1)[4] == SeededDataset(Noise(), seed=1)[(0, 4)]
