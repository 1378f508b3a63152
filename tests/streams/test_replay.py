from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from clmerge.streams import ClassIncremental, SklearnDigits, StreamDataModule
from clmerge.streams.replay import ReplaySampler, replay_memory
from clmerge.streams.samplers import EpochSampler


class Number:
    """An image becomes its mean, which tells images apart well enough."""

    def __call__(self, image):
        return torch.tensor([float(np.asarray(image).mean())])


@pytest.fixture(scope="module")
def stream():
    return ClassIncremental(SklearnDigits(), num_tasks=5)


def places(memory):
    """Where every image in memory comes from."""
    return {(part.plan.targets[k], part.plan.indices[k]) for part in memory.parts for k in range(len(part))}


def test_memory_is_class_balanced_and_of_the_size_asked_for(stream):
    for task in range(1, 5):
        memory = replay_memory(stream, task, 50, None, seed=0)
        counts = Counter(memory.targets)
        assert len(memory) == 50
        assert set(counts) == set(range(2 * task))
        assert max(counts.values()) - min(counts.values()) <= 1
    assert len(replay_memory(stream, 0, 50, None, seed=0)) == 0


def test_what_was_dropped_never_comes_back(stream):
    memories = [places(replay_memory(stream, task, 37, None, seed=3)) for task in range(1, 5)]
    for before, after in pairwise(memories):
        old_classes = {target for target, _ in before}
        assert {place for place in after if place[0] in old_classes} <= before


def test_memory_is_a_function_of_the_seed(stream):
    first, again, other = (places(replay_memory(stream, 3, 30, None, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_all_keeps_everything_and_bytes_are_those_of_decoded_images(stream):
    everything = replay_memory(stream, 2, "all", None, seed=0)
    assert len(everything) == sum(len(stream.dataset(task, "train")) for task in (0, 1))
    memory = replay_memory(stream, 2, 10, None, seed=0)
    image = stream.dataset(0, "train")[0][0]
    assert memory.nbytes == 10 * 3 * image.width * image.height


def test_the_sampler_gives_every_batch_as_many_from_memory():
    sampler = ReplaySampler(EpochSampler(range(10), seed=1), 10, 4, batch_size=4, seed=1)
    sampler.set_epoch(2)
    keys = list(sampler)
    assert len(keys) == len(sampler) == 10 + 3 * 4
    assert {epoch for epoch, _ in keys} == {2}
    positions = [position for _, position in keys]
    batches = [positions[start : start + 8] for start in range(0, 22, 8)]
    assert [sum(position < 10 for position in batch) for batch in batches] == [4, 4, 2]
    assert sorted(position for position in positions if position < 10) == list(range(10))
    from_memory = [position for position in positions if position >= 10]
    assert set(from_memory) == {10, 11, 12, 13}
    assert sorted(from_memory[:4]) == [10, 11, 12, 13]  # each once before any comes again
    assert keys == list(sampler)
    sampler.set_epoch(3)
    assert [p for _, p in sampler] != positions


def test_processes_share_the_task_and_draw_their_own_from_memory():
    def order(rank):
        current = EpochSampler(range(12), seed=1, num_replicas=2, rank=rank)
        return [p for _, p in ReplaySampler(current, 12, 100, batch_size=3, seed=1)]

    first, second = order(0), order(1)
    assert sorted(p for p in first + second if p < 12) == list(range(12))
    assert len(first) == len(second) == 12
    assert [p for p in first if p >= 12] != [p for p in second if p >= 12]


def data_module(stream, **options):
    data = StreamDataModule(32, **options)
    data.setup_stream(stream, Number(), Number())
    return data


def test_training_batches_under_replay(stream):
    data = data_module(stream, replay=20)
    assert all(len(images) == 32 for images, _ in list(data.train_dataloader())[:-1])  # nothing to replay yet
    data.task = 2
    batches = [labels for _, labels in data.train_dataloader()]
    new = set(stream.tasks[2].classes)
    assert all(len(labels) == 64 for labels in batches[:-1])
    assert all(sum(int(label) in new for label in labels) == 32 for labels in batches[:-1])
    assert sum(int(label) in new for labels in batches for label in labels) == len(stream.dataset(2, "train"))
    assert {int(label) for labels in batches for label in labels} == set(range(6))
    again = [labels for _, labels in data.train_dataloader()]
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))


def test_joint_training_shuffles_all_data_so_far(stream):
    data = data_module(stream, replay="all")
    data.task = 1
    labels = torch.cat([labels for _, labels in data.train_dataloader()])
    wanted = [target for task in (0, 1) for target in stream.dataset(task, "train").targets]
    assert sorted(labels.tolist()) == sorted(wanted)
    assert set(labels[:32].tolist()) == {0, 1, 2, 3}


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="replay of 0 or more images, or 'all', got -1"):
        StreamDataModule(replay=-1)
