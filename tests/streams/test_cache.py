from collections import namedtuple

import pytest
import torch
from torchvision import transforms

from clmerge.streams import ClassIncremental, SklearnDigits
from clmerge.streams.cache import CachedImages, TaskImages, cached

BYTES = 3 * 8 * 8 * 4


@pytest.fixture(scope="module")
def stream():
    return ClassIncremental(SklearnDigits(), num_tasks=5)


def test_cached_images_are_the_transformed_ones(stream):
    data = stream.dataset(0, "test", transforms.ToTensor())
    kept = cached(data, 10**7)
    assert kept.targets == data.targets
    assert all(torch.equal(kept[i][0], data[i][0]) and kept[i][1] == data[i][1] for i in range(len(data)))


def test_images_that_do_not_fit_are_not_kept(stream):
    data = stream.dataset(0, "test", transforms.ToTensor())
    assert cached(data, BYTES * len(data)) is not None
    assert cached(data, BYTES * len(data) - 1) is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_that_do_not_fit_may_wait_in_a_file(stream, tmp_path, num_workers):
    data = stream.dataset(0, "test", transforms.ToTensor())
    kept = cached(data, 100, tmp_path / "images.bin", num_workers=num_workers)
    assert kept.on_disk
    assert (tmp_path / "images.bin").stat().st_size == BYTES * len(data)
    assert torch.equal(kept.images, cached(data, 10**7).images)
    assert not cached(data, 10**7, tmp_path / "other.bin").on_disk
    assert not (tmp_path / "other.bin").exists()


def test_a_disk_without_room_is_left_alone(stream, tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")(10**6, 10**6 - 100, 100)
    monkeypatch.setattr("clmerge.streams.cache.shutil.disk_usage", lambda folder: usage)
    assert cached(stream.dataset(0, "test", transforms.ToTensor()), 100, tmp_path / "images.bin") is None


def test_random_transforms_other_types_and_changing_shapes_are_not_kept(stream):
    noisy = transforms.Compose([transforms.ToTensor(), lambda image: image + torch.rand(())])
    assert cached(stream.dataset(0, "test", noisy), 10**7) is None
    assert cached(stream.dataset(0, "test"), 10**7) is None
    brightest = transforms.Compose([transforms.ToTensor(), lambda image: image[image > 0.9]])
    assert cached(stream.dataset(0, "test", brightest), 10**7) is None


def test_nothing_to_keep():
    empty = ClassIncremental(SklearnDigits(), val_fraction=0.0).dataset(0, "val", transforms.ToTensor())
    assert cached(empty, 10**7) is None


def test_items_of_several_tasks_know_their_task(stream):
    parts = [stream.dataset(task, "test", transforms.ToTensor()) for task in (3, 1)]
    images = TaskImages(parts, [3, 1])
    assert len(images) == len(parts[0]) + len(parts[1])
    assert not images.in_memory
    labels = [(target, task) for _, target, task in (images[i] for i in range(len(images)))]
    assert labels == [(t, 3) for t in parts[0].targets] + [(t, 1) for t in parts[1].targets]


def test_empty_parts_are_skipped():
    part, empty = CachedImages(torch.ones(2, 1), [4, 5]), CachedImages(torch.ones(0, 1), [])
    images = TaskImages([empty, part, empty, part], [0, 1, 2, 3])
    assert [images[i][1:] for i in range(len(images))] == [(4, 1), (5, 1), (4, 3), (5, 3)]
    assert images.in_memory
    assert len(TaskImages([], [])) == 0
