import importlib.util
import pickle

import numpy as np
import pytest
from streams import tiny_layouts as layouts

from clmerge.streams import TorchvisionSource
from clmerge.streams.class_names import FER2013, FLOWERS102, GTSRB


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    layouts.accept_any_checksum(monkeypatch)


CASES = {
    "MNIST": (layouts.write_mnist, [str(digit) for digit in range(10)], 20, 20, None),
    "FashionMNIST": (lambda root: layouts.write_mnist(root, "FashionMNIST"), None, 20, 20, None),
    "KMNIST": (lambda root: layouts.write_mnist(root, "KMNIST"), None, 20, 20, None),
    "EMNIST": (
        lambda root: layouts.write_emnist(root, "digits", list(range(10))),
        [str(digit) for digit in range(10)],
        10,
        10,
        None,
    ),
    "CIFAR10": (layouts.write_cifar10, [f"thing{index}" for index in range(10)], 50, 10, None),
    "CIFAR100": (layouts.write_cifar100, [f"big thing {index:02d}" for index in range(100)], 200, 200, None),
    "SVHN": (layouts.write_svhn, [str(digit) for digit in range(10)], 20, 20, None),
    "STL10": (layouts.write_stl10, None, 20, 20, None),
    "GTSRB": (layouts.write_gtsrb, list(GTSRB), 86, 43, None),
    "DTD": (layouts.write_dtd, ["banded", "spiral led"], 4, 4, 4),
    "Food101": (layouts.write_food101, ["apple pie", "sushi"], 2, 2, None),
    "OxfordIIITPet": (layouts.write_pets, ["Abyssinian", "American Bulldog"], 2, 2, None),
    "Flowers102": (layouts.write_flowers, list(FLOWERS102), 102, 204, 102),
    "EuroSAT": (layouts.write_eurosat, ["annual crop land", "lake or sea"], 8, 2, None),
    "RenderedSST2": (layouts.write_sst2, ["negative", "positive"], 4, 4, 4),
    "FER2013": (layouts.write_fer2013, [names[0] for names in FER2013], 7, 14, None),
    "StanfordCars": (layouts.write_cars, ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], 6, 6, None),
    "SUN397": (layouts.write_sun397, ["abbey", "apartment building outdoor"], 8, 2, None),
}


@pytest.mark.parametrize("name", CASES)
def test_real_layout(name, tmp_path):
    write, class_names, num_train, num_test, num_val = CASES[name]
    write(tmp_path)
    source = TorchvisionSource(name, root=tmp_path)
    if class_names is not None:
        assert source.class_names == class_names
    train, test, val = source.train(), source.test(), source.val()
    assert (len(train), len(test)) == (num_train, num_test)
    assert (None if val is None else len(val)) == num_val
    for images in (train, test):
        assert {type(target) for target in images.targets} == {int}
        assert set(images.targets) == set(range(len(source.class_names)))
        assert images[len(images) - 1][0].mode == "RGB"
    # The labels read without decoding are those that torchvision hands out.
    if hasattr(train, "dataset"):
        assert train.targets == [int(train.dataset[index][1]) for index in range(len(train))]
    assert all(template.count("{}") == 1 for template in source.templates)
    assert pickle.loads(pickle.dumps(source)).train().targets == train.targets


def test_every_data_set_is_covered():
    from typing import get_args

    from clmerge.streams.torchvision_source import _RECIPES, TorchvisionName

    assert set(get_args(TorchvisionName)) == set(_RECIPES) == {*CASES, "PCAM"}


def test_emnist_letters_lose_the_class_that_is_none(tmp_path):
    layouts.write_emnist(tmp_path, "letters", list(range(1, 27)))
    source = TorchvisionSource("EMNIST", root=tmp_path, emnist_split="letters")
    assert source.class_names[0] == "a"
    assert len(source.class_names) == 26
    assert sorted(source.train().targets) == list(range(26))


def test_fer2013_has_synonyms_in_its_prompts(tmp_path):
    layouts.write_fer2013(tmp_path)
    assert TorchvisionSource("FER2013", root=tmp_path).prompt_names[3] == ("happy", "smiling")


def test_seed_cuts_what_has_no_official_split(tmp_path):
    layouts.write_eurosat(tmp_path, per_class=20)
    cuts = [TorchvisionSource("EuroSAT", root=tmp_path, seed=seed).test().indices for seed in (0, 0, 1)]
    assert cuts[0] == cuts[1] != cuts[2]


@pytest.mark.skipif(importlib.util.find_spec("h5py") is None, reason="PCAM's files are HDF5")
def test_pcam(tmp_path):
    import h5py

    (tmp_path / "pcam").mkdir()
    for part in ("train", "valid", "test"):
        stem = tmp_path / "pcam" / f"camelyonpatch_level_2_split_{part}"
        with h5py.File(f"{stem}_x.h5", "w") as file:
            file["x"] = layouts.pixels(4, size=96, channels=3)
        with h5py.File(f"{stem}_y.h5", "w") as file:
            file["y"] = np.array([0, 1, 1, 0], np.uint8).reshape(4, 1, 1, 1)
    assert TorchvisionSource("PCAM", root=tmp_path).train().targets == [0, 1, 1, 0]


def test_missing_files_name_folder_layout_and_download(tmp_path):
    source = TorchvisionSource("CIFAR100", root=tmp_path / "nowhere")
    with pytest.raises(RuntimeError, match=r"nowhere as cifar-100-python/train, test, meta\. .*download=True"):
        source.train()


def test_missing_files_of_a_set_that_cannot_be_downloaded(tmp_path):
    with pytest.raises(RuntimeError, match=r"stanford_cars.*cannot download this data set"):
        TorchvisionSource("StanfordCars", root=tmp_path, download=True).train()


def test_construction_reads_nothing_and_checks_the_name():
    assert TorchvisionSource("SVHN", root="/does/not/exist").name == "SVHN"
    with pytest.raises(ValueError, match="got 'CIFAR1000'"):
        TorchvisionSource("CIFAR1000", root="x")
    with pytest.raises(ValueError, match="test_fraction"):
        TorchvisionSource("EuroSAT", root="x", test_fraction=1.5)
