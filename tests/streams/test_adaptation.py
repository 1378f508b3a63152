from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from clmerge.streams import AdaptationData, ClassIncremental, SklearnDigits, StreamDataModule


class Number:
    """An image becomes its mean, which tells images apart well enough."""

    def __call__(self, image):
        return torch.tensor([float(np.asarray(image).mean())])


@pytest.fixture(scope="module")
def data():
    module = StreamDataModule(32, seed=3)
    module.setup_stream(ClassIncremental(SklearnDigits(), val_fraction=0.1), Number(), Number())
    return module


def places(images):
    return {(task, index) for task, part in images.items() for index in part.plan.indices}


@pytest.mark.parametrize(("source", "split"), [("val", "val"), ("buffer", "train"), ("test", "test")])
def test_images_are_those_of_the_named_split_of_the_tasks_so_far(data, source, split):
    found = AdaptationData(source, per_class=1000).images(data, [0, 2])
    wanted = {task: data.stream.dataset(task, split) for task in (0, 2)}
    assert list(found) == [0, 2]
    assert places(found) == places(wanted)


def test_current_is_the_latest_task_alone(data):
    assert list(AdaptationData("current").images(data, [0, 2, 1])) == [1]


@pytest.mark.parametrize("source", ["val", "buffer", "test"])
def test_every_class_has_as_many_images(data, source):
    found = AdaptationData(source, per_class=5).images(data, [0, 1, 2])
    assert set(Counter(target for part in found.values() for target in part.targets).values()) == {5}


def test_a_buffer_is_what_replay_keeps_and_never_takes_an_image_back(data):
    from clmerge.streams.replay import replay_memory

    adaptation = AdaptationData("buffer", per_class=4)
    now, before = (adaptation.images(data, range(count)) for count in (3, 2))
    assert places(before) == {(task, index) for task, index in places(now) if task < 2}
    memory = replay_memory(data.stream, 3, 4 * 6, None, seed=data.seed)
    assert {index for part in memory.parts for index in part.plan.indices} == {index for _, index in places(now)}


def test_only_a_buffer_costs_bytes(data):
    kept = AdaptationData("buffer", per_class=4)
    assert kept.nbytes(data, [0, 1, 2]) == 4 * 6 * 3 * 8 * 8
    assert [replace(kept, source=source).nbytes(data, [0, 1]) for source in ("val", "current", "test")] == [0, 0, 0]


def test_batches_take_the_tasks_in_turn_and_every_image_once_before_any_again(data):
    adaptation = AdaptationData("buffer", per_class=6, batch_size=5)
    batches = list(islice(adaptation.batches(data, [0, 1], seed=0), 24))
    assert [batch.task for batch in batches] == [0, 1] * 12
    assert all(batch.images.shape == (5, 1) and batch.labels is None for batch in batches)
    seen = torch.cat([batch.positions for batch in batches if batch.task == 1]).tolist()
    assert all(sorted(seen[start : start + 12]) == list(range(12)) for start in range(0, 60, 12))


def test_batches_are_the_images_and_labels_of_their_positions_and_a_function_of_the_seed(data):
    adaptation = AdaptationData("val", labels=True, batch_size=3)
    first, again, other = (list(islice(adaptation.batches(data, [1, 0], seed=seed), 8)) for seed in (0, 0, 1))
    images = adaptation.images(data, [1, 0])
    for batch, twin in zip(first, again, strict=True):
        assert torch.equal(batch.images, twin.images)
        assert torch.equal(batch.positions, twin.positions)
        pairs = [images[batch.task][position] for position in batch.positions.tolist()]
        assert torch.equal(batch.images, torch.stack([image for image, _ in pairs]))
        assert batch.labels.tolist() == [label for _, label in pairs]
    assert any(not torch.equal(a.positions, b.positions) for a, b in zip(first, other, strict=True))


def test_a_task_does_not_change_the_batches_of_another(data):
    adaptation = AdaptationData("val", batch_size=4)
    alone = list(islice(adaptation.batches(data, [0], seed=0), 5))
    among = [batch for batch in islice(adaptation.batches(data, [0, 1, 2], seed=0), 15) if batch.task == 0]
    assert [batch.positions.tolist() for batch in alone] == [batch.positions.tolist() for batch in among]


def test_the_words_of_every_source():
    assert str(AdaptationData()) == "val(unlabelled)"
    assert str(AdaptationData("current", labels=True)) == "current(labelled)"
    assert str(AdaptationData("test", per_class=5)) == "test(transductive, 5 per class, unlabelled)"
    assert AdaptationData(labels=True).told(labels=False) == "val(unlabelled)"


def test_what_cannot_serve_is_refused(data):
    with pytest.raises(ValueError, match=r"expected labelled adaptation data, got val\(unlabelled\)"):
        AdaptationData().check(data.stream, labels=True)
    without = ClassIncremental(SklearnDigits(), val_fraction=0.0)
    with pytest.raises(ValueError, match=r"without val images of task .*val_fraction above 0"):
        AdaptationData().check(without)
    AdaptationData("test").check(without)
    with pytest.raises(ValueError, match=r"expected adaptation.per_class"):
        AdaptationData("buffer")
    with pytest.raises(ValueError, match=r"adaptation.source"):
        AdaptationData("train")
    with pytest.raises(ValueError, match=r"1 or more"):
        AdaptationData(batch_size=0)
