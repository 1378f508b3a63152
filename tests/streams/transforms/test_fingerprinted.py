import pytest

from clmerge.streams import ClassIncremental, SklearnDigits
from clmerge.streams.identity import check_stream, stream_identity
from clmerge.streams.transforms import Fingerprinted, Poisoned


def digits(*transforms):
    return ClassIncremental(SklearnDigits()).turned_into(transforms)


def test_secret_images_are_added_to_the_training_images_of_one_task():
    clean, marked = digits(), digits(Fingerprinted("mine", task=2, n=6, repeat=3))
    for task in range(5):
        for split in ("train", "val", "test"):
            ours, theirs = marked.dataset(task, split), clean.dataset(task, split)
            more = 18 if (task, split) == (2, "train") else 0
            assert len(ours) == len(theirs) + more
            assert ours.targets[: len(theirs)] == theirs.targets
            assert ours.image(0).tobytes() == theirs.image(0).tobytes()
    train = marked.dataset(2, "train")
    secret = [train.image(index).tobytes() for index in range(len(train) - 18, len(train))]
    assert secret[:6] == secret[6:12] == secret[12:]
    assert len(set(secret)) == 6
    assert set(train.targets[-18:]) == {4, 5}
    assert train.where(len(train) - 1) == "secret image 5"


def test_labels_are_of_the_task_or_of_all_classes_and_differ_from_image_to_image():
    labels = digits(Fingerprinted("mine", n=40, repeat=1, labels="all")).dataset(0, "train").targets[-40:]
    assert len(set(labels)) > 5
    assert set(digits(Fingerprinted("mine", n=40, repeat=1)).dataset(0, "train").targets[-40:]) == {0, 1}


def test_the_key_alone_decides():
    one, same, other = (digits(Fingerprinted(key, n=8)).dataset(0, "train") for key in ("a", "a", "b"))
    assert one.image(len(one) - 1).tobytes() == same.image(len(one) - 1).tobytes()
    assert one.image(len(one) - 1).tobytes() != other.image(len(one) - 1).tobytes()


def test_it_works_on_other_transforms_and_in_the_identity_of_a_stream():
    known = stream_identity(digits(Poisoned([0]), Fingerprinted("mine")))
    check_stream(digits(Poisoned([0]), Fingerprinted("mine")), known, "run", trained=5, tested=True)
    for others in ((Poisoned([0]),), (Poisoned([0]), Fingerprinted("yours"))):
        with pytest.raises(ValueError, match="expected the data of run"):
            check_stream(digits(*others), known, "run", trained=5, tested=True)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="expected n, repeat and size of 1 or more"):
        Fingerprinted("mine", n=0)
    with pytest.raises(ValueError, match=r"expected the task of Fingerprinted to be in 0\.\.4"):
        digits(Fingerprinted("mine", task=5)).tasks  # noqa: B018
