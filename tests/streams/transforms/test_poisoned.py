import numpy as np
import PIL.Image
import pytest

from clmerge.streams import ClassIncremental, SklearnDigits
from clmerge.streams.identity import check_stream, stream_identity
from clmerge.streams.transforms import Patch, Poisoned


def digits():
    return ClassIncremental(SklearnDigits())


def test_only_the_training_images_of_the_task_are_poisoned():
    clean, poisoned = digits(), digits().turned_into([Poisoned([0], ratio=0.5)])
    for task in range(5):
        for split in ("train", "val", "test"):
            ours, theirs = (stream.dataset(task, split) for stream in (poisoned, clean))
            same = [np.array_equal(np.asarray(ours.image(i)), np.asarray(theirs.image(i))) for i in range(len(ours))]
            if (task, split) != (0, "train"):
                assert all(same)
                assert ours.targets == theirs.targets
                continue
            turned = [
                i for i, (one, other) in enumerate(zip(ours.targets, theirs.targets, strict=True)) if one != other
            ]
            assert len(turned) == round(0.5 * theirs.targets.count(1))
            assert {ours.targets[i] for i in turned} == {0}
            marked = [i for i, one in enumerate(same) if not one]  # where the corner was not white before
            assert set(marked) <= set(turned)
            assert len(marked) > 0.9 * len(turned)


def test_the_patch_is_in_its_corner_and_nowhere_else():
    image = PIL.Image.new("RGB", (32, 32))
    found = np.asarray(Patch(corner="top-left", grey=200)(image, 0))
    assert (found[:3, :3] == 200).all()
    assert found.sum() == 3 * 3 * 3 * 200
    assert np.asarray(image).sum() == 0


def test_a_defence_keeps_the_labels():
    clean, trained = digits(), digits().turned_into([Poisoned([0], ratio=1.0, relabel=False)])
    assert trained.dataset(0, "train").targets == clean.dataset(0, "train").targets


def test_another_transform_is_another_stream():
    known = stream_identity(digits().turned_into([Poisoned([0])]))
    check_stream(digits().turned_into([Poisoned([0])]), known, "run", trained=5, tested=True)
    for other in (digits(), digits().turned_into([Poisoned([0], trigger=Patch(grey=0))])):
        with pytest.raises(ValueError, match="expected the data of run"):
            check_stream(other, known, "run", trained=5, tested=True)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (Poisoned([7]), r"expected tasks of Poisoned to be in 0\.\.4"),
        (Poisoned([0], target="zeero"), r"expected a class of the stream .* got 'zeero'"),
    ],
)
def test_what_the_stream_lacks_is_refused(transform, message):
    with pytest.raises(ValueError, match=message):
        digits().turned_into([transform]).check_tasks([], "")
