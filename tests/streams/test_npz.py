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
    with pytest.raises(ValueError, match="allow_pickle=False"):
        NpzSource(tmp_path / "bad.npz", names=["a"]).train()
