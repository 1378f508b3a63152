from functools import partial

import numpy as np
import pytest
from PIL import Image

from clmerge.streams import ClassIncremental, ImageFolderSource, NpzSource
from clmerge.streams.identity import check_stream, stream_identity


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for number, name in enumerate("abcd"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for image in range(count):
                Image.new("RGB", (4, 4), (number, image, 0)).save(tmp_path / "data" / split / name / f"{image}.png")
    return tmp_path / "data"


def of_folder(folder):
    return ClassIncremental(ImageFolderSource(str(folder)), num_tasks=2, val_fraction=0)


def of_arrays(tmp_path, *, first=0, labels=(0, 1, 2, 3)):
    images = np.arange(4 * 16, dtype=np.uint8).reshape(4, 4, 4)
    images[0, 0, 0] = first
    train = np.asarray(labels)
    arrays = {"train_images": images, "train_labels": train, "test_images": images, "test_labels": np.arange(4)}
    np.savez(tmp_path / "data.npz", classes=np.asarray(list("abcd")), **arrays)
    return ClassIncremental(NpzSource(str(tmp_path / "data.npz")), num_tasks=2, val_fraction=0)


def test_a_folder_that_was_moved_is_the_same_and_one_that_was_changed_is_not(folder, tmp_path):
    expected = stream_identity(of_folder(folder))
    assert [task["train"] for task in expected["tasks"]] == [6, 6]
    moved = folder.rename(tmp_path / "elsewhere")
    check = partial(check_stream, expected=expected, run="runs/a", trained=2, tested=True)
    check(of_folder(moved))
    image = moved / "train" / "d" / "0.png"
    image.rename(image.with_name("9.png"))
    with pytest.raises(ValueError, match=r"task 2 \(c-d\), got other images"):
        check(of_folder(moved))
    image.with_name("9.png").unlink()
    with pytest.raises(
        ValueError, match=r"task 2 \(c-d\), got 5 train images instead of 6; give the run its data back"
    ):
        check(of_folder(moved))
    with pytest.raises(ValueError, match=r"expected the 2 tasks of runs/a, got a stream of 4"):
        check(ClassIncremental(ImageFolderSource(str(moved)), num_tasks=4, val_fraction=0))


@pytest.mark.parametrize(
    ("name", "trained", "tested", "used"),
    [
        ("train/d/0.png", 2, False, True),
        ("train/d/0.png", 1, True, False),
        ("train/a/0.png", 1, False, True),
        ("test/d/0.png", 0, True, True),
        ("test/a/0.png", 2, False, False),
    ],
)
def test_a_file_may_be_mended_until_it_is_used(folder, name, trained, tested, used):
    expected = stream_identity(of_folder(folder))
    (folder / name).write_bytes(b"mended")
    check = partial(check_stream, of_folder(folder), expected, "runs/a", trained=trained, tested=tested)
    if not used:
        check()
        return
    message = r"expected the data of runs/a for task \d \(.-.\), got (train|test) images in files of other sizes; give"
    with pytest.raises(ValueError, match=message):
        check()


def test_other_arrays_and_other_labels_are_noticed(tmp_path):
    expected = stream_identity(of_arrays(tmp_path))
    check = partial(check_stream, expected=expected, run="runs/a", trained=0, tested=False)
    check(of_arrays(tmp_path))
    with pytest.raises(ValueError, match=r"task 1 \(a-b\), got other images"):
        check(of_arrays(tmp_path, first=9))
    with pytest.raises(ValueError, match=r"task 1 \(a-b\), got other labels"):
        check(of_arrays(tmp_path, labels=(1, 0, 2, 3)))
