"""Streams under a shift: corrupted splits, domains, tasks and classes held out, few images."""

from collections import Counter

import numpy as np
import pytest

from clmerge.names import safe_name
from clmerge.streams import ClassIncremental, SklearnDigits, TaskIncremental
from clmerge.streams.identity import check_stream, stream_identity
from clmerge.streams.transforms import (
    Corrupted,
    Corruption,
    Domains,
    FewShot,
    HeldOut,
    Imbalanced,
    LabelNoise,
    Rotation,
    Unchanged,
)

SPLITS = ("train", "val", "test")


def digits(*transforms, **settings):
    return ClassIncremental(SklearnDigits(), **settings).turned_into(transforms)


def pixels(images, index):
    return np.asarray(images.image(index))


def test_only_the_named_splits_and_tasks_are_corrupted():
    noise = Corruption("gaussian_noise")
    clean, turned = digits(), digits(Corrupted(noise, tasks=[1]))
    for task in range(2):
        for split in SPLITS:
            own, theirs = turned.dataset(task, split), clean.dataset(task, split)
            assert own.targets == theirs.targets
            changes = not np.array_equal(pixels(own, 3), pixels(theirs, 3))
            assert changes == ((task, split) == (1, "test"))
    plan = clean.dataset(1, "test").plan
    expected = noise(clean.dataset(1, "test").image(3), plan.indices[3])
    assert np.array_equal(pixels(turned.dataset(1, "test"), 3), np.asarray(expected))


def test_domains_deal_out_every_image_once_and_keep_the_splits_apart():
    changes = [Unchanged(), Rotation(90), Corruption("contrast", 2)]
    clean, stream = digits(), digits(Domains(changes))
    assert [task.name for task in stream.tasks] == ["clean", "rotated_90", "contrast_2"]
    for task in stream.tasks:
        assert task.classes == tuple(range(10))
        assert task.class_names == tuple(stream.class_names)
    for split in SPLITS:
        dealt = [index for task in range(3) for index in stream.dataset(task, split).plan.indices]
        whole = [index for task in range(5) for index in clean.dataset(task, split).plan.indices]
        assert sorted(dealt) == sorted(whole)
    for task in range(3):
        assert max(Counter(stream.dataset(task, "train").targets).values()) < 48  # a third of about 131 of each class
    images, change = stream.dataset(1, "test"), changes[1]
    index = images.plan.indices[0]
    original = SklearnDigits().test().image(index)
    assert np.array_equal(pixels(images, 0), np.asarray(change(original, index)))
    assert np.array_equal(pixels(images, 0), np.rot90(np.asarray(original)))
    assert images.targets[0] == SklearnDigits().test().targets[index]


def test_domains_of_all_images_by_task():
    stream = digits(Domains([Unchanged(), Rotation(15)], tasks="apart", images="all"), num_tasks=2)
    assert [len(task.classes) for task in stream.tasks] == [5, 5, 5, 5]
    first, second = (task.name for task in digits(num_tasks=2).tasks)
    names = [safe_name(f"{task}-{domain}") for task in (first, second) for domain in ("clean", "rotated-15")]
    assert [task.name for task in stream.tasks] == names
    for first in (0, 2):
        one, other = (stream.dataset(task, "train") for task in (first, first + 1))
        assert one.plan.indices == other.plan.indices
        assert one.targets == other.targets
    assert not set(stream.tasks[0].classes) & set(stream.tasks[2].classes)


def test_equal_domains_get_names_of_their_own():
    assert [task.name for task in digits(Domains([Unchanged(), Unchanged()])).tasks] == ["clean", "clean-2"]


def test_domains_without_validation_images():
    stream = digits(Domains([Unchanged(), Rotation(15)]), val_fraction=0.0)
    assert [len(stream.dataset(task, "val")) for task in range(2)] == [0, 0]


def test_domains_of_several_data_sets_are_refused():
    sources = [SklearnDigits(), SklearnDigits(seed=1)]
    stream = TaskIncremental(sources).turned_into([Domains([Unchanged()])])
    with pytest.raises(ValueError, match="expected tasks of one data set for Domains, got several"):
        _ = stream.tasks


def test_held_out_tasks_are_there_for_probes_alone():
    clean, stream = digits(), digits(HeldOut([1, 4]))
    assert [task.name for task in stream.tasks] == [clean.tasks[task].name for task in (0, 2, 3)]
    assert [task.index for task in stream.tasks] == [0, 1, 2]
    assert [(task.index, task.name) for task in stream.held_out] == [(0, clean.tasks[1].name), (1, clean.tasks[4].name)]
    assert stream.class_names == clean.class_names
    assert stream.dataset(1, "train").plan.indices == clean.dataset(2, "train").plan.indices
    for split in SPLITS:
        assert stream.held_out_plan(1, split).indices == clean.dataset(4, split).plan.indices


def test_held_out_tasks_add_up():
    stream = digits(HeldOut([0]), HeldOut([0]))
    assert [task.name for task in stream.held_out] == [task.name for task in digits().tasks[:2]]


@pytest.mark.parametrize("shots", [1, 3, 16])
def test_few_shots_of_every_class(shots):
    clean, stream = digits(), digits(FewShot(shots))
    for task in range(5):
        for split, count in (("train", shots), ("val", min(4, shots))):
            own, whole = stream.dataset(task, split), clean.dataset(task, split)
            assert set(Counter(own.targets).values()) == {count}
            label_of = dict(zip(whole.plan.indices, whole.targets, strict=True))
            assert [label_of[index] for index in own.plan.indices] == own.targets
        assert stream.dataset(task, "test").plan.indices == clean.dataset(task, "test").plan.indices


def test_shots_depend_on_the_seed_and_small_classes_keep_all():
    chosen = [digits(FewShot(4, seed)).dataset(0, "train").plan.indices for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(digits(FewShot(10_000)).dataset(0, "train")) == len(digits().dataset(0, "train"))


def test_label_noise_gives_another_class_of_the_task():
    clean, noisy = digits(num_tasks=2), digits(LabelNoise(0.25, tasks=[1]), num_tasks=2)
    assert noisy.dataset(0, "train").targets == clean.dataset(0, "train").targets
    for split in ("val", "test"):
        assert noisy.dataset(1, split).targets == clean.dataset(1, split).targets
    pairs = [*zip(clean.dataset(1, "train").targets, noisy.dataset(1, "train").targets, strict=True)]
    wrong = Counter((right, given) for right, given in pairs if right != given)
    assert sum(wrong.values()) == round(0.25 * len(pairs))
    assert {given for _, given in wrong} == set(clean.tasks[1].classes)
    assert len(wrong) == 5 * 4  # every pair of classes occurs


def test_label_noise_needs_another_class():
    with pytest.raises(ValueError, match="expected two classes or more in a task of LabelNoise"):
        _ = digits(LabelNoise(), num_tasks=10).tasks


def test_imbalanced_classes_get_rarer_along_a_power():
    whole, rare = (
        Counter(stream.dataset(0, "train").targets)
        for stream in (digits(num_tasks=1), digits(Imbalanced(100.0), num_tasks=1))
    )
    for label, count in whole.items():
        assert rare[label] == max(1, round(count * 100 ** (-label / 9)))
    assert digits(Imbalanced(1.0)).dataset(0, "train").targets == digits().dataset(0, "train").targets
    split = digits(Imbalanced(100.0))  # classes count over the stream, not within a task
    assert Counter(label for task in range(5) for label in split.dataset(task, "train").targets) == rare
    assert split.dataset(4, "test").targets == digits().dataset(4, "test").targets


@pytest.mark.parametrize(
    "other",
    [Corrupted(Corruption("jpeg")), Domains([Unchanged()] * 5), HeldOut([4]), FewShot(4), LabelNoise(), Imbalanced()],
    ids=repr,
)
def test_a_turned_stream_is_another_stream(other):
    known = stream_identity(digits(other))
    check_stream(digits(other), known, "run", trained=5, tested=True)
    with pytest.raises(ValueError, match="expected the"):
        check_stream(digits(), known, "run", trained=5, tested=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Corrupted(splits=[]), "expected one split or more"),
        (lambda: Domains([]), "expected one change or more for Domains"),
        (lambda: HeldOut([]), "expected one task or more for HeldOut"),
        (lambda: HeldOut([1, 1]), "expected one task or more for HeldOut"),
        (lambda: FewShot(0), "expected one shot or more"),
        (lambda: LabelNoise(0.0), "expected a ratio above 0"),
        (lambda: Imbalanced(0.5), "expected a factor of 1 or more"),
        (lambda: digits(HeldOut([7])).tasks, r"expected tasks of HeldOut to be in 0\.\.4"),
        (lambda: digits(HeldOut([0, 1, 2, 3, 4])).tasks, "expected HeldOut to leave a task to train, got all 5"),
        (lambda: digits(Corrupted(tasks=[5])).tasks, r"expected tasks of Corrupted to be in 0\.\.4"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
