"""Tiny data in the real layouts: what a person's data folder looks like, a few images per class."""

import csv
import io
import json
import pickle
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import pytest


def pixels(num: int, size: int = 8, channels: int = 0, seed: int = 0) -> np.ndarray:
    shape = (num, size, size, channels) if channels else (num, size, size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_image(path: Path, shade: int = 0, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (size, size), (shade % 256, shade % 256, 0)).save(path)


def write_tree(top: Path, classes: Sequence[str], per_class: int, prefix: str = "image", suffix: str = ".png") -> None:
    for index, name in enumerate(classes):
        for number in range(per_class):
            save_image(top / name / f"{prefix}_{number}{suffix}", shade=10 * index + number)


def png(shade: int, size: int = 4) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (size, size), (shade, shade, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_members(path: Path, files: Mapping[str, bytes], mode: Literal["w", "w:gz"] = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(first: int, count: int, num_classes: int = 2) -> dict[str, bytes]:
    """Members of a WebDataset archive; images show their number."""
    files = {}
    for number in range(first, first + count):
        files[f"{number:06d}.png"] = png(number)
        files[f"{number:06d}.cls"] = str(number % num_classes).encode()
    return files


def hugging_face_split(
    count: int,
    *,
    first: int = 0,
    names: Sequence[str] = ("cat", "sea_lion"),
    columns: Sequence[str] = ("image", "label"),
) -> Any:
    """A split whose images show their row; without names, labels are plain numbers."""
    import datasets

    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({columns[0]: datasets.Image(), columns[1]: label})
    images = [{"bytes": png(first + row), "path": None} for row in range(count)]
    labels = [row % (len(names) or 2) for row in range(count)]
    return datasets.Dataset.from_dict({columns[0]: images, columns[1]: labels}, features=features)


def write_idx(folder: Path, names: Sequence[str], labels: Sequence[int]) -> None:
    """Write one image and one label file in the idx format of MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    images = pixels(len(labels), size=28)
    (folder / names[0]).write_bytes(struct.pack(">IIII", 0x803, len(labels), 28, 28) + images.tobytes())
    (folder / names[1]).write_bytes(struct.pack(">II", 0x801, len(labels)) + bytes(labels))


def write_mnist(root: Path, name: str = "MNIST", num_classes: int = 10, per_class: int = 2) -> None:
    labels = [index % num_classes for index in range(per_class * num_classes)]
    for stem in ("train", "t10k"):
        write_idx(root / name / "raw", [f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"], labels)


def write_emnist(root: Path, split: str, labels: Sequence[int]) -> None:
    for part in ("train", "test"):
        stem = f"emnist-{split}-{part}"
        write_idx(root / "EMNIST" / "raw", [f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"], labels)


def _write_cifar_batch(path: Path, key: str, labels: Sequence[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = pixels(len(labels), size=32, channels=3).reshape(len(labels), -1)
    path.write_bytes(pickle.dumps({"data": data, key: list(labels)}))


def write_cifar100(root: Path, names: Sequence[str] = (), per_class: int = 2) -> list[str]:
    """Write CIFAR-100's pickles; returns the class names, underscores included."""
    chosen = list(names) or [f"big_thing_{index:02d}" for index in range(100)]
    labels = [index % len(chosen) for index in range(per_class * len(chosen))]
    for part in ("train", "test"):
        _write_cifar_batch(root / "cifar-100-python" / part, "fine_labels", labels)
    (root / "cifar-100-python" / "meta").write_bytes(pickle.dumps({"fine_label_names": chosen}))
    return chosen


def write_cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        _write_cifar_batch(folder / name, "labels", list(range(10)))
    names = [f"thing{index}" for index in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))


def write_svhn(root: Path) -> None:
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    labels = np.array([[digit] for digit in range(1, 11)] * 2, dtype=np.uint8)
    images = pixels(len(labels), size=32, channels=3).transpose(1, 2, 3, 0)
    for part in ("train", "test"):
        savemat(root / f"{part}_32x32.mat", {"X": images, "y": labels})


def write_stl10(root: Path) -> None:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True, exist_ok=True)
    labels = bytes(list(range(1, 11)) * 2)
    for part in ("train", "test"):
        (folder / f"{part}_X.bin").write_bytes(pixels(20, size=96, channels=3).tobytes())
        (folder / f"{part}_y.bin").write_bytes(labels)
    (folder / "unlabeled_X.bin").write_bytes(b"")
    (folder / "fold_indices.txt").write_text("0 1\n")
    (folder / "class_names.txt").write_text("airplane\n")


def write_gtsrb(root: Path, num_classes: int = 43, per_class: int = 2) -> None:
    base = root / "gtsrb"
    classes = [f"{index:05d}" for index in range(num_classes)]
    write_tree(base / "GTSRB" / "Training", classes, per_class, suffix=".ppm")
    rows = []
    for index in range(num_classes):
        save_image(base / "GTSRB" / "Final_Test" / "Images" / f"{index:05d}.ppm", shade=index)
        rows.append({"Filename": f"{index:05d}.ppm", "ClassId": index})
    with (base / "GT-final_test.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["Filename", "ClassId"], delimiter=";")
        writer.writeheader()
        writer.writerows(rows)


def write_dtd(root: Path, classes: Sequence[str] = ("banded", "spiral_led"), per_split: int = 2) -> None:
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for offset, part in enumerate(("train", "val", "test")):
        lines = []
        for name in classes:
            for number in range(per_split):
                file = f"{name}/{name}_{offset}{number}.jpg"
                save_image(base / "images" / file)
                lines.append(file)
        (base / "labels" / f"{part}1.txt").write_text("\n".join(lines) + "\n")


def write_food101(root: Path) -> None:
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    for part in ("train", "test"):
        listed = {name: [f"{name}/{part}"] for name in ("apple_pie", "sushi")}
        for files in listed.values():
            save_image(base / "images" / f"{files[0]}.jpg")
        (base / "meta" / f"{part}.json").write_text(json.dumps(listed))


def write_pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    (base / "annotations" / "trimaps").mkdir(parents=True)
    for part in ("trainval", "test"):
        lines = []
        for label, name in enumerate(("Abyssinian", "american_bulldog"), start=1):
            save_image(base / "images" / f"{name}_{part[0]}1.jpg")
            lines.append(f"{name}_{part[0]}1 {label} 1 1")
        (base / "annotations" / f"{part}.txt").write_text("\n".join(lines) + "\n")


def write_flowers(root: Path) -> None:
    from scipy.io import savemat

    base = root / "flowers-102"
    for number in range(1, 4 * 102 + 1):
        save_image(base / "jpg" / f"image_{number:05d}.jpg")
    labels = [(number % 102) + 1 for number in range(4 * 102)]
    ids = np.arange(1, 4 * 102 + 1)
    savemat(base / "imagelabels.mat", {"labels": np.array(labels)})
    savemat(base / "setid.mat", {"trnid": ids[:102], "valid": ids[102:204], "tstid": ids[204:]})


def write_eurosat(root: Path, per_class: int = 5) -> None:
    write_tree(root / "eurosat" / "2750", ["AnnualCrop", "SeaLake"], per_class, suffix=".jpg")


def write_sst2(root: Path) -> None:
    for folder in ("train", "valid", "test"):
        write_tree(root / "rendered-sst2" / folder, ["negative", "positive"], 2)


def write_fer2013(root: Path) -> None:
    base = root / "fer2013"
    base.mkdir(parents=True)
    with (base / "fer2013.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["emotion", "pixels", "Usage"])
        writer.writeheader()
        for usage in ("Training", "PublicTest", "PrivateTest"):
            for emotion in range(7):
                writer.writerow({"emotion": emotion, "pixels": " ".join(["7"] * 48 * 48), "Usage": usage})


def write_cars(root: Path, classes: Sequence[str] = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012")) -> None:
    from scipy.io import savemat

    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    labels = [index % len(classes) + 1 for index in range(3 * len(classes))]
    for part, path in (
        ("train", base / "devkit" / "cars_train_annos.mat"),
        ("test", base / "cars_test_annos_withlabels.mat"),
    ):
        annotations = np.array(
            [(f"{number:05d}.jpg", label) for number, label in enumerate(labels)],
            dtype=[("fname", object), ("class", np.uint8)],
        )
        savemat(path, {"annotations": annotations})
        for number in range(len(labels)):
            save_image(base / f"cars_{part}" / f"{number:05d}.jpg")
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(list(classes), dtype=object)})


def write_sun397(root: Path, per_class: int = 5) -> None:
    base = root / "SUN397"
    names = ["/a/abbey", "/a/apartment_building/outdoor"]
    for name in names:
        for number in range(per_class):
            save_image(base / name[1:] / f"sun_{number}.jpg")
    (base / "ClassName.txt").write_text("\n".join(names) + "\n")


def write_npz(path: Path, *, classes: bool = True, val: bool = False, column: bool = True, channels: int = 0) -> None:
    arrays: dict[str, np.ndarray] = {}
    for part in ("train", "test", *(("val",) if val else ())):
        labels = np.arange(12) % 3
        arrays[f"{part}_images"] = pixels(12, size=28, channels=channels)
        arrays[f"{part}_labels"] = labels[:, None] if column else labels
    if classes:
        arrays["classes"] = np.array(["a_b", "c", "d"])
    np.savez(path, **arrays)


def write_domain_lists(root: Path, domains: Sequence[str], classes: Sequence[str] = ("sea_turtle", "zigzag")) -> None:
    for domain in domains:
        for part in ("train", "test"):
            lines = []
            for label, name in enumerate(classes):
                for number in range(4):
                    path = f"{domain}/{name}/{part} {number}.jpg"
                    save_image(root / path)
                    lines.append(f"{path} {label}")
            (root / f"{domain}_{part}.txt").write_text("\n".join(lines) + "\n")


def accept_any_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision accept stand-in files; it compares checksums of the real ones."""
    from torchvision import datasets

    for module in ("cifar", "svhn", "stl10", "flowers102", "fer2013"):
        monkeypatch.setattr(getattr(datasets, module), "check_integrity", lambda path, md5=None: Path(path).is_file())
