import pytest

from clmerge.streams import ClassIncremental, SklearnDigits
from clmerge.streams.transforms import Poisoned, Repeated


def digits(*transforms):
    return ClassIncremental(SklearnDigits(), num_tasks=3).turned_into(transforms)


def indices(stream, task, split="train"):
    return stream.dataset(task, split).plan.indices


def test_the_training_images_are_divided_by_class_and_the_others_are_those_of_the_task():
    clean, found = digits(), digits(Repeated([1], times=3))
    assert [task.name for task in found.tasks] == [
        "zero-one-two",
        "three-four-five",
        "three-four-five-2",
        "three-four-five-3",
        "six-seven-and-2",
    ]
    assert [task.index for task in found.tasks] == [0, 1, 2, 3, 4]
    parts = [indices(found, task) for task in (1, 2, 3)]
    assert sorted(index for part in parts for index in part) == sorted(indices(clean, 1))
    for label in (3, 4, 5):
        counts = [found.dataset(task, "train").targets.count(label) for task in (1, 2, 3)]
        assert max(counts) - min(counts) <= 1
    for task in (1, 2, 3):
        assert found.tasks[task].classes == (3, 4, 5)
        for split in ("val", "test"):
            assert indices(found, task, split) == indices(clean, 1, split)
    assert [indices(found, task) for task in (0, 4)] == [indices(clean, 0), indices(clean, 2)]
    assert indices(digits(Repeated([1], times=3, seed=1)), 1) != parts[0]


def test_without_a_split_all_images_come_every_time():
    clean, found = digits(), digits(Repeated([0, 2], split=False))
    assert [indices(found, task) for task in range(5)] == [indices(clean, task) for task in (0, 0, 1, 2, 2)]


def test_transforms_that_follow_count_the_repetitions():
    found = digits(Repeated([0], split=False), Poisoned([1], target=0, ratio=1.0))
    assert set(found.dataset(0, "train").targets) == {0, 1, 2}
    assert set(found.dataset(1, "train").targets) == {0}


def test_what_cannot_be_repeated_is_refused():
    with pytest.raises(ValueError, match="expected times of 2 or more"):
        Repeated([0], times=1)
    with pytest.raises(ValueError, match=r"expected tasks of Repeated to be in 0\.\.2"):
        digits(Repeated([3])).check_tasks([], "")
    with pytest.raises(ValueError, match="expected at least one sample for each of 1000 parts"):
        digits(Repeated([0], times=1000)).check_tasks([], "")
