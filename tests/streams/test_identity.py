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
    check_stream(of_folder(moved), expected, "runs/a")
    image = moved / "train" / "d" / "0.png"
    image.write_bytes(image.read_bytes() + b"more")
    with pytest.raises(ValueError, match=r"expected the data of runs/a for task 2 \(c-d\), got other images"):
        check_stream(of_folder(moved), expected, "runs/a")
    image.rename(image.with_name("9.png"))
    with pytest.raises(ValueError, match=r"task 2 \(c-d\), got other images"):
        check_stream(of_folder(moved), expected, "runs/a")
    image.with_name("9.png").unlink()
    with pytest.raises(
        ValueError, match=r"task 2 \(c-d\), got 5 train images instead of 6; give the run its data back"
    ):
        check_stream(of_folder(moved), expected, "runs/a")
    with pytest.raises(ValueError, match=r"expected the 2 tasks of runs/a, got a stream of 4"):
        check_stream(ClassIncremental(ImageFolderSource(str(moved)), num_tasks=4, val_fraction=0), expected, "runs/a")


def test_other_arrays_and_other_labels_are_noticed(tmp_path):
    expected = stream_identity(of_arrays(tmp_path))
    check_stream(of_arrays(tmp_path), expected, "runs/a")
    with pytest.raises(ValueError, match=r"task 1 \(a-b\), got other images"):
        check_stream(of_arrays(tmp_path, first=9), expected, "runs/a")
    with pytest.raises(ValueError, match=r"task 1 \(a-b\), got other labels"):
        check_stream(of_arrays(tmp_path, labels=(1, 0, 2, 3)), expected, "runs/a")
