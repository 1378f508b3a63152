import numpy as np
import pytest
from streams.tiny_layouts import pixels, write_npz

from clmerge.streams import NpzSource


@pytest.mark.parametrize(("column", "channels"), [(True, 0), (False, 3)])
def test_medmnist_layout(tmp_path, column, channels):
    write_npz(tmp_path / "tiny.npz", column=column, channels=channels)
    source = NpzSource(tmp_path / "tiny.npz", templates="generic")
    assert source.name == "tiny"
    assert source.class_names == ["a b", "c", "d"]
    assert len(source.train()) == len(source.test()) == 12
    assert source.val() is None
    image, target = source.train()[4]
    assert (image.mode, image.size, target) == ("RGB", (28, 28), 1)


def test_validation_split_of_the_file(tmp_path):
    write_npz(tmp_path / "tiny.npz", val=True)
    assert len(NpzSource(tmp_path / "tiny.npz").val()) == 12


def test_names_given_or_demanded(tmp_path):
    write_npz(tmp_path / "tiny.npz", classes=False)
    assert NpzSource(tmp_path / "tiny.npz", names=["x", "y", "z"]).class_names == ["x", "y", "z"]
    with pytest.raises(ValueError, match=r"no array 'classes': pass names"):
        NpzSource(tmp_path / "tiny.npz").train()


def test_file_or_array_missing(tmp_path):
    with pytest.raises(RuntimeError, match=r"\.npz file in MedMNIST's layout at .*none\.npz"):
        NpzSource(tmp_path / "none.npz", names=["a"]).train()
    np.savez(tmp_path / "half.npz", train_images=pixels(2), train_labels=np.array([0, 0]))
    with pytest.raises(RuntimeError, match=r"found no \['test_images', 'test_labels'\]"):
        NpzSource(tmp_path / "half.npz", names=["a"]).test()


def test_several_labels_per_image(tmp_path):
    np.savez(tmp_path / "multi.npz", train_images=pixels(2), train_labels=np.zeros((2, 14), np.int64))
    with pytest.raises(ValueError, match=r"expected one label per image.*shape \(2, 14\)"):
        NpzSource(tmp_path / "multi.npz", names=["a"]).train()


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", train_images=np.array([object()]), train_labels=np.array([0]))
    with pytest.raises(RuntimeError, match=r"bad\.npz, got .*allow_pickle=False"):
        NpzSource(tmp_path / "bad.npz", names=["a"]).train()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_labels": np.array([0.0, 1.5])}, r"whole numbers as labels in train_labels of .*bad\.npz, got float64"),
        ({"train_labels": np.array(["a", "b"])}, r"whole numbers as labels in train_labels of .*bad\.npz, got <U1"),
        (
            {"train_labels": np.array([0, 3])},
            r"labels in 0\.\.1 .*got 3 for image 1 of train_images of .*bad\.npz in the",
        ),
        ({"train_labels": np.array([0, -1])}, r"labels in 0\.\.1 .*got -1 for image 1 of train_images of .*bad\.npz"),
        (
            {"train_labels": np.array([0])},
            r"one label per image, got 2 images of train_images of .*bad\.npz and 1 labels",
        ),
        (
            {"train_images": pixels(2) / 255},
            r"uint8 images.*float64 of shape \(2, 8, 8\) of train_images of .*bad\.npz",
        ),
        (
            {"train_images": pixels(2).astype("uint16")},
            r"uint8 images.*uint16 of shape .* of train_images of .*bad\.npz",
        ),
        ({"classes": np.array([["x", "y"]])}, r"class name per class id in 'classes' of .*bad\.npz"),
    ],
)
def test_arrays_that_do_not_fit_are_named_with_their_file(tmp_path, arrays, message):
    good = {"train_images": pixels(2), "train_labels": np.array([0, 1]), "classes": np.array(["x", "y"])}
    np.savez(tmp_path / "bad.npz", **good | arrays)
    with pytest.raises(ValueError, match=message):
        NpzSource(tmp_path / "bad.npz").train()


def test_a_damaged_archive_is_named(tmp_path):
    np.savez(tmp_path / "bad.npz", train_images=pixels(2), train_labels=np.array([0, 1]), classes=np.array(["x", "y"]))
    data = (tmp_path / "bad.npz").read_bytes()
    for content in (data[: len(data) // 2], b"", b"text", data[:60] + bytes(40) + data[100:]):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(RuntimeError, match=r"plain arrays at .*bad\.npz, got"):
            NpzSource(tmp_path / "bad.npz").train()
