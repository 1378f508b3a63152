"""Make the two streams of scripts/bench_methods.py, and the small ViT that the first one starts from.

    python scripts/methods_data.py --data FOLDER --work FOLDER [--epochs 120] [--seed 0]

Reads from --data: caltech101_64.zip (caltech101_64/{train,test}/CLASS/*.jpg), MNIST and FashionMNIST in torchvision's
layout, kmnist10k.npz, notmnist10k.npz and pneumoniamnist.npz in MedMNIST's. Writes to --work:

    caltech/pretrain/{train,test}/CLASS   the 41 classes with most images, for pretraining alone
    caltech/stream/{train,test}/CLASS     the 60 others, the stream, with up to 8 test images each
    caltech/vit.safetensors               timm's `test_vit3` at 64 px, trained to tell the 41 classes apart
    grey/NAME.npz                         five data sets of small grey images, cut to 1500 images for training each
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.datasets import MNIST, FashionMNIST, ImageFolder
from torchvision.transforms import v2

ARCHITECTURE = "test_vit3"
SIZE = 64
NUM_PRETRAIN = 41
NUM_TRAIN, NUM_TEST = 1500, 200
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


def pretrain(work: Path, *, epochs: int, seed: int) -> None:
    """Train the ViT on the held-out classes, and say what it knows of them."""
    torch.manual_seed(seed)
    train, labels = images_of(work / "pretrain" / "train")
    test, test_labels = images_of(work / "pretrain" / "test")
    backbone = timm.create_model(ARCHITECTURE, num_classes=0, img_size=SIZE)
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
    for epoch in range(epochs):
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
        if epoch % 20 == 19 or epoch == epochs - 1:
            model.eval()
            with torch.no_grad():
                scores = torch.cat([model(normalised(part)) for part in test.split(256)])
            accuracy = (scores.argmax(dim=1) == test_labels).float().mean()
            seconds = time.process_time() - started
            print(f"epoch {epoch + 1}: loss {loss:.3f}, test accuracy {accuracy:.1%}, {seconds:.0f} CPU s", flush=True)
    save_file(backbone.state_dict(), work / "vit.safetensors")


def write_grey(data: Path, work: Path, *, seed: int, num_train: int = NUM_TRAIN) -> None:
    """Cut five grey data sets to a size that many runs can afford."""
    work.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    sets: dict[str, dict[str, np.ndarray]] = {}
    for name, dataset, classes in (("mnist", MNIST, DIGITS), ("fashion", FashionMNIST, GARMENTS)):
        arrays: dict[str, np.ndarray] = {"classes": np.array(classes)}
        for split in ("train", "test"):
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


def main() -> None:
    """Make everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_grey(options.data, options.work / "grey", seed=options.seed)
    if not (options.work / "caltech" / "stream").is_dir():
        split_caltech(options.data / "caltech101_64.zip", options.work / "caltech")
    pretrain(options.work / "caltech", epochs=options.epochs, seed=options.seed)


if __name__ == "__main__":
    main()
