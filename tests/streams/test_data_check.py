import json

import numpy as np
import pytest
from streams.tiny_layouts import write_npz, write_tree

from clmerge.streams import ClassIncremental, ImageFolderSource, NpzSource
from clmerge.streams.data_check import DataCheck, UnreadableImage, check_images, leave_out


@pytest.fixture
def tree(tmp_path):
    for part, number in (("train", 5), ("test", 3)):
        write_tree(tmp_path / "tree" / part, ["cat", "dog"], number)
    return tmp_path / "tree"


def stream_of(tree, **options):
    return ClassIncremental(ImageFolderSource(tree, templates="generic"), num_tasks=2, **options)


def spoil(tree):
    (tree / "train" / "dog" / "image_3.png").write_bytes(b"")
    (tree / "test" / "cat" / "image_1.png").write_text("<html>404</html>")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_image_that_cannot_be_read_is_found(tree, num_workers):
    assert check_images(stream_of(tree)) == DataCheck(16, ())
    spoil(tree)
    check = check_images(stream_of(tree, val_fraction=0.0), num_workers=num_workers)
    assert check.num_images == 16
    assert [(image.task, image.split) for image in check.unreadable] == [(0, "test"), (1, "train")]
    html, empty = check.unreadable
    assert html.image == str(tree / "test" / "cat" / "image_1.png")
    assert html.reason.startswith(f"expected an image in {html.image}, got cannot identify")
    assert html.reason.endswith(", in the test images of task 1, cat")
    assert empty.reason == (
        f"expected an image in {tree}/train/dog/image_3.png, got an empty file, in the training images of task 2, dog"
    )


def test_they_are_left_out_and_nothing_else_is(tree):
    before = stream_of(tree)
    spoil(tree)
    check = check_images(before)
    stream = stream_of(tree)
    leave_out(stream, check)
    for task in range(2):
        for split in ("train", "val", "test"):
            old, new = before.dataset(task, split), stream.dataset(task, split)
            bad = {image.image for image in check.unreadable if (image.task, image.split) == (task, split)}
            kept = [(old.where(i), old.targets[i]) for i in range(len(old)) if old.where(i) not in bad]
            assert [(new.where(i), new.targets[i]) for i in range(len(new))] == kept
            assert [new[i][0].mode for i in range(len(new))] == ["RGB"] * len(kept)
    assert sum(len(stream.dataset(task, split)) for task in range(2) for split in ("train", "val", "test")) == 14
    assert check_images(stream) == DataCheck(14, ())


def test_a_class_is_never_lost(tree):
    for number in range(3):
        (tree / "test" / "dog" / f"image_{number}.png").write_bytes(b"")
    stream = stream_of(tree)
    with pytest.raises(ValueError, match=r"readable test images of class 'dog' in task 2, dog, got none"):
        leave_out(stream, check_images(stream))


def test_the_record_is_kept_and_checked(tree, tmp_path):
    spoil(tree)
    check = check_images(stream_of(tree))
    path = tmp_path / "data_check.json"
    assert DataCheck.load(path) is None
    check.save(path)
    assert DataCheck.load(path) == check
    assert len(json.loads(path.read_text())["unreadable"]) == 2
    with pytest.raises(ValueError, match=r"expected .*absent\.png among the test images of task 1, cat.* other data\?"):
        leave_out(stream_of(tree), DataCheck(16, (UnreadableImage(0, "test", "absent.png", "gone"),)))
    for text in (
        "",
        "[" * 100_000,
        "[]",
        '{"num_images": "2", "unreadable": []}',
        '{"num_images": 2}',
        '{"num_images": 2, "unreadable": [{"task": 0}]}',
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"record of a data check in .*data_check\.json"):
            DataCheck.load(path)


def test_arrays_are_checked_too(tmp_path):
    write_npz(tmp_path / "tiny.npz")
    assert check_images(ClassIncremental(NpzSource(tmp_path / "tiny.npz"), num_tasks=3)) == DataCheck(24, ())


def test_a_check_leaves_the_random_state_alone(tree):
    import torch

    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    check_images(stream_of(tree), num_workers=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
