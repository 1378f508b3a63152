import math
import pickle
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams.tiny_layouts import pixels, write_npz

from clmerge.streams import ClassIncremental, NpzSource, SklearnDigits
from clmerge.streams.class_incremental import even_sizes
from clmerge.streams.sources import ArrayImages, DataSource


class Numbered(DataSource):
    """A source with a given number of classes, a few images each; image ``i`` is ``i`` everywhere."""

    def __init__(self, num_classes, per_class=4, test_classes=None):
        super().__init__("Numbered", templates="generic")
        self.num_classes = num_classes
        self.per_class = per_class
        self.test_classes = num_classes if test_classes is None else test_classes

    @property
    def class_names(self):
        return [f"class {index}" for index in range(self.num_classes)]

    def _load(self, split):
        classes = self.num_classes if split == "train" else self.test_classes
        targets = [index % classes for index in range(classes * self.per_class)]
        return ArrayImages(pixels(len(targets), size=2), targets)


def positions(stream, split):
    """All ``(task, source position)`` of a split."""
    return [(task.index, i) for task in stream.tasks for i in stream.dataset(task.index, split).plan.indices]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), num_classes=st.integers(1, 23))
def test_no_class_and_no_image_is_ever_dropped(data, num_classes):
    order = data.draw(st.permutations(range(num_classes)))
    kind = data.draw(st.sampled_from(["even", "uneven", "base"]))
    if kind == "even" or num_classes < 2:
        options = {"num_tasks": data.draw(st.integers(1, num_classes))}
    elif kind == "base":
        num_tasks = data.draw(st.integers(2, num_classes))
        options = {
            "num_tasks": num_tasks,
            "base_classes": data.draw(st.integers(1, num_classes - num_tasks + 1)),
        }
    else:
        cuts = sorted(data.draw(st.sets(st.integers(1, num_classes - 1))))
        bounds = [0, *cuts, num_classes]
        options = {"classes_per_task": [high - low for low, high in pairwise(bounds)]}
    stream = ClassIncremental(Numbered(num_classes), class_order=list(order), **options)

    seen = [class_id for task in stream.tasks for class_id in task.classes]
    assert sorted(seen) == list(range(num_classes))
    arrived = 0
    for task in stream.tasks:
        assert set(task.classes) == set(order[arrived : arrived + len(task.classes)])
        arrived += len(task.classes)
        for split in ("train", "val", "test"):
            targets = stream.dataset(task.index, split).targets
            assert set(targets) == set(task.classes)
    learned = [i for split in ("train", "val") for _, i in positions(stream, split)]
    assert sorted(learned) == list(range(4 * num_classes))
    assert sorted(i for _, i in positions(stream, "test")) == list(range(4 * num_classes))


@pytest.mark.parametrize(
    ("num_classes", "num_tasks"), [(100, 5), (100, 10), (100, 20), (100, 50), (200, 20), (196, 10)]
)
def test_even_sizes_are_those_of_the_magmax_protocol(num_classes, num_tasks):
    bounds = [math.floor(num_classes / num_tasks * index) for index in range(num_tasks + 1)]
    bounds[-1] = num_classes
    assert even_sizes(num_classes, num_tasks) == [b - a for a, b in pairwise(bounds)]


def test_base_classes_come_first():
    stream = ClassIncremental(Numbered(10), num_tasks=3, base_classes=5)
    assert [task.classes for task in stream.tasks] == [(0, 1, 2, 3, 4), (5, 6), (7, 8, 9)]


def test_labels_are_those_of_the_source_and_match_the_images():
    source = SklearnDigits()
    stream = ClassIncremental(source, num_tasks=2, class_order=[9, 1, 7, 3, 5, 0, 2, 4, 6, 8])
    assert stream.tasks[0].class_names == ("one", "three", "five", "seven", "nine")
    data = stream.dataset(0, "train")
    for index in (0, len(data) - 1):
        image, target = data[index]
        expected, label = source.train()[data.plan.indices[index]]
        assert (image.tobytes(), target) == (expected.tobytes(), label)
        assert target == data.targets[index]


def test_random_order_depends_on_the_seed_alone():
    def classes(seed):
        return [task.classes for task in ClassIncremental(Numbered(10), class_order="random", seed=seed).tasks]

    assert classes(1) == classes(1) != classes(2)


def test_validation_is_stratified_disjoint_stable_and_seeded():
    def stream(seed=0, num_tasks=5):
        return ClassIncremental(SklearnDigits(), num_tasks=num_tasks, seed=seed, val_fraction=0.2)

    first = stream()
    train, val = positions(first, "train"), positions(first, "val")
    assert not set(train) & set(val)
    assert val == positions(stream(), "val") != positions(stream(seed=1), "val")
    # How the stream is cut into tasks does not change what is held out.
    assert {i for _, i in val} == {i for _, i in positions(stream(num_tasks=2), "val")}
    counts = Counter(first.dataset(0, "val").targets)
    whole = Counter(first.source.train().targets)
    assert counts == {c: round(0.2 * whole[c]) for c in (0, 1)}


def test_validation_may_be_none_or_bounded():
    assert positions(ClassIncremental(SklearnDigits(), val_fraction=0.0), "val") == []
    bounded = ClassIncremental(SklearnDigits(), val_fraction=0.5, max_val=20)
    assert [len(bounded.dataset(task, "val")) for task in range(5)] == [20] * 5


def test_official_validation_split_is_served(tmp_path):
    write_npz(tmp_path / "tiny.npz", val=True)
    stream = ClassIncremental(NpzSource(tmp_path / "tiny.npz"), num_tasks=3)
    assert len(stream.dataset(1, "train")) == 4
    val = stream.dataset(1, "val")
    assert val.targets == [1] * 4
    assert val.plan.images is stream.source.val()
    without = ClassIncremental(NpzSource(tmp_path / "tiny.npz"), num_tasks=3, val_fraction=0.0)
    assert len(without.dataset(1, "val")) == 0


def test_construction_reads_nothing():
    stream = ClassIncremental(NpzSource("/does/not/exist.npz"), num_tasks=2)
    assert stream.name == "exist-2"


def test_published_order_is_used_by_name():
    stream = ClassIncremental(Numbered(100, per_class=2), num_tasks=50, class_order="magmax_cifar100")
    assert [task.classes for task in stream.tasks[:3]] == [(70, 89), (11, 13), (53, 63)]


def test_picklable():
    stream = ClassIncremental(SklearnDigits(), num_tasks=3)
    tasks = stream.tasks
    copy = pickle.loads(pickle.dumps(stream))
    assert copy.tasks == tasks
    assert copy.dataset(1, "val").plan.indices == stream.dataset(1, "val").plan.indices


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 0}, "num_tasks of 1 or more, got 0"),
        (
            {"classes_per_task": [5, 0, 5]},
            r"at least one class in every task, got classes_per_task=\[5, 0, 5\]",
        ),
        ({"classes_per_task": [5, 5], "base_classes": 5}, "classes_per_task or base_classes, got both"),
        ({"classes_per_task": [5, 5], "num_tasks": 3}, "leave num_tasks out"),
        ({"base_classes": 0}, "base_classes of 1 or more"),
        ({"base_classes": 5, "num_tasks": 1}, "num_tasks of 2 or more"),
        ({"class_order": "magmax_cifar10"}, "class_order to be a list or one of .* got 'magmax_cifar10'"),
        ({"val_fraction": 1.0}, "val_fraction in"),
        ({"max_val": 0}, "max_val of 1 or more"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        ClassIncremental(SklearnDigits(), **options)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (Numbered(10), {"num_tasks": 11}, "10 classes in 'Numbered' for num_tasks=11; set num_tasks to 10 or less"),
        (Numbered(10), {"classes_per_task": [5, 4]}, r"sum to the 10 classes of Numbered, got \[5, 4\]"),
        (Numbered(10), {"class_order": [0, 1, 2]}, "each of the 10 class ids of Numbered once, got"),
        (Numbered(10), {"class_order": "magmax_cub200"}, "got 'magmax_cub200', which has 200"),
        (
            Numbered(10, test_classes=8),
            {},
            r"no test images of 2 class\(es\): \['class 8', 'class 9'\]",
        ),
    ],
)
def test_options_that_do_not_fit_the_data(source, options, message):
    stream = ClassIncremental(source, **options)
    with pytest.raises(ValueError, match=message):
        _ = stream.tasks
