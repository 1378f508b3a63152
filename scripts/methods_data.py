"""Make the streams of scripts/bench_methods.py, and the small ViTs that one of them starts from.

    python scripts/methods_data.py --data FOLDER --work FOLDER [--epochs 120] [--seed 0] [--sizes medium small large]

Reads from --data: caltech101_64.zip (caltech101_64/{train,test}/CLASS/*.jpg), MNIST and FashionMNIST in torchvision's
layout, kmnist10k.npz, notmnist10k.npz and pneumoniamnist.npz in MedMNIST's. Writes to --work:

    caltech/pretrain/{train,test}/CLASS   the 41 classes with most images, for pretraining alone
    caltech/stream/{train,test}/CLASS     the 60 others, the stream, with up to 8 test images each
    caltech/SIZE                          ViTs at 64 px that timm loads from the folder, trained to tell the 41 classes
                                          apart: small (0.3 million parameters), medium (0.8, timm's `test_vit3`), large
                                          (1.4); `card.json` says what they reach, and after how many epochs and seconds
    caltech/medium-N                      the medium one after N epochs
    grey/NAME.npz                         five data sets of small grey images, cut to 1000 images for training each
    grey/four.npz                         the first four of them in one, 40 classes

A folder of a ViT that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torchvision.datasets import MNIST, FashionMNIST, ImageFolder
from torchvision.transforms import v2

SIZES: dict[str, tuple[str, dict[str, int]]] = {
    "medium": ("test_vit3", {}),
    "small": ("test_vit", {}),
    "large": ("test_vit3", {"embed_dim": 128, "num_heads": 4}),
}
SNAPSHOTS = (5, 20)  # epochs after which the medium one is kept, too
SIZE = 64
NUM_PRETRAIN = 41
NUM_TRAIN, NUM_TEST = 1000, 200
SPLITS = ("train", "test")
NUM_CALTECH_TEST = 8  # per class of the stream: every run evaluates all of them after every task
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
GARMENTS = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


def split_caltech(archive: Path, work: Path) -> None:
    """Unpack the archive into classes for pretraining and classes for the stream."""
    with zipfile.ZipFile(archive) as file:
        names = [name for name in file.namelist() if name.endswith(".jpg")]
        counts = Counter(name.split("/")[2] for name in names if name.split("/")[1] == "train")
        large = {name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:NUM_PRETRAIN]}
        seen: Counter[tuple[str, str]] = Counter()
        for name in sorted(names):
            _, split, class_name, image = name.split("/")
            seen[split, class_name] += 1
            if split == "test" and class_name not in large and seen[split, class_name] > NUM_CALTECH_TEST:
                continue
            target = work / ("pretrain" if class_name in large else "stream") / split / class_name / image
            target.parent.mkdir(parents=True, exist_ok=True)
            with file.open(name) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def images_of(folder: Path) -> tuple[Tensor, Tensor]:
    """Return all images, uint8 of shape ``(N, 3, 64, 64)``, and their class ids."""
    found = ImageFolder(folder, transform=v2.Compose([v2.PILToTensor(), v2.Resize((SIZE, SIZE), antialias=True)]))
    images = torch.stack([image for image, _ in found])
    return images, torch.tensor(found.targets)


def normalised(images: Tensor) -> Tensor:
    """Scale to [-1, 1], as timm's ViTs expect."""
    return images.float() / 127.5 - 1


def accuracy_of(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that the model names rightly, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        scores = torch.cat([model(normalised(part)) for part in images.split(256)])
    return float((scores.argmax(dim=1) == labels).float().mean())


def pretrain(work: Path, size: str, *, epochs: int, seed: int) -> None:
    """Train a ViT on the held-out classes, and write it with what it knows of them."""
    torch.manual_seed(seed)
    train, labels = images_of(work / "pretrain" / "train")
    test, test_labels = images_of(work / "pretrain" / "test")
    architecture, settings = SIZES[size]
    backbone = timm.create_model(architecture, num_classes=0, img_size=SIZE, **settings)
    model = nn.Sequential(backbone, nn.Linear(backbone.num_features, NUM_PRETRAIN))
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=(0.35, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
            v2.RandomGrayscale(0.1),
        ]
    )
    mix = v2.MixUp(alpha=0.2, num_classes=NUM_PRETRAIN)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    batch, step, total = 128, 0, epochs * (len(train) // 128)
    started = time.process_time()
    for epoch in range(1, epochs + 1):
        model.train()
        order = torch.randperm(len(train))
        for chosen in order[: len(train) // batch * batch].split(batch):
            warmup, rest = min(1.0, (step + 1) / 200), 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.param_groups[0]["lr"] = 1e-3 * warmup * rest
            # A crop of its own for every eighth of a batch: cheaper than one for every image, and nearly as good.
            images = torch.cat([augment(part) for part in train[chosen].chunk(8)])
            mixed, targets = mix(normalised(images), labels[chosen])
            loss = nn.functional.cross_entropy(model(mixed), targets, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        snapshot = size == "medium" and epoch in SNAPSHOTS
        if epoch % 20 == 0 or epoch == epochs or snapshot:
            card = {
                "architecture": architecture,
                "settings": settings,
                "parameters": sum(p.numel() for p in backbone.parameters()),
                "seed": seed,
                "epochs": epoch,
                "of": epochs,
                "images": len(train),
                "cpu_seconds": round(time.process_time() - started),
                "test_accuracy": accuracy_of(model, test, test_labels),
                "test_images": len(test),
            }
            print(f"{size}: {card}", flush=True)
            if epoch == epochs or snapshot:
                folder = work / (size if epoch == epochs else f"{size}-{epoch}")
                timm.models.save_for_hf(backbone, folder, model_args={**settings, "img_size": SIZE})
                (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def write_grey(data: Path, work: Path, *, seed: int, num_train: int = NUM_TRAIN) -> None:
    """Cut five grey data sets to a size that many runs can afford."""
    work.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    sets: dict[str, dict[str, np.ndarray]] = {}
    for name, dataset, classes in (("mnist", MNIST, DIGITS), ("fashion", FashionMNIST, GARMENTS)):
        arrays: dict[str, np.ndarray] = {"classes": np.array(classes)}
        for split in SPLITS:
            found = dataset(data, train=split == "train", download=False)
            arrays |= {f"{split}_images": found.data.numpy(), f"{split}_labels": found.targets.numpy()}
        sets[name] = arrays
    for name in ("kmnist", "notmnist", "pneumonia"):
        file = data / ("pneumoniamnist.npz" if name == "pneumonia" else f"{name}10k.npz")
        with np.load(file, allow_pickle=False) as archive:
            sets[name] = {key: archive[key] for key in archive if not key.startswith("val_")}
    for name, arrays in sets.items():
        for split, count in (("train", num_train), ("test", NUM_TEST)):
            labels = arrays[f"{split}_labels"].reshape(-1)
            chosen = np.sort(generator.permutation(len(labels))[:count])
            arrays |= {f"{split}_images": arrays[f"{split}_images"][chosen], f"{split}_labels": labels[chosen]}
        np.savez_compressed(work / f"{name}.npz", **arrays)
    parts = [sets[name] for name in ("mnist", "fashion", "kmnist", "notmnist")]
    four = {f"{split}_images": np.concatenate([part[f"{split}_images"] for part in parts]) for split in SPLITS}
    for split in SPLITS:
        shifted = [part[f"{split}_labels"].reshape(-1) + 10 * place for place, part in enumerate(parts)]
        four[f"{split}_labels"] = np.concatenate(shifted)
    np.savez_compressed(work / "four.npz", classes=np.concatenate([part["classes"] for part in parts]), **four)


def main() -> None:
    """Make everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    options = parser.parse_args()
    if not (options.work / "grey" / "four.npz").is_file():
        write_grey(options.data, options.work / "grey", seed=options.seed)
    if not (options.work / "caltech" / "stream").is_dir():
        split_caltech(options.data / "caltech101_64.zip", options.work / "caltech")
    for size in options.sizes:
        if not (options.work / "caltech" / size / "card.json").is_file():
            pretrain(options.work / "caltech", size, epochs=options.epochs, seed=options.seed)


if __name__ == "__main__":
    main()
