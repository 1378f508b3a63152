"""Pretrain the nano CLIP that ships inside the package, and print the figures of its model card.

    python scripts/pretrain_nano_clip.py --data FOLDER --out FOLDER [--epochs N] [--seed 0]
    python scripts/pretrain_nano_clip.py --data FOLDER --out FOLDER --evaluate  # figures alone

The result is a folder that open_clip loads by itself (`local-dir:FOLDER`). Training is CLIP-like: images
against prompts built from class names. As there are only 272 class names, the contrast is taken against
class names and not against the other captions of the batch.

Pretraining sets (read from --data): MNIST, FashionMNIST, a part of KMNIST, 242 characters of Omniglot. Held
out, for figures only: scikit-learn's digits, notMNIST, PneumoniaMNIST. The same seed, machine and number of
threads give the same file.
"""

from __future__ import annotations

import argparse
import gzip
import io
import itertools
import json
import math
import re
import time
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

EMBED_DIM = 96
VISION = {"image_size": 28, "patch_size": 7, "width": 96, "layers": 5, "head_width": 32}
TEXT = {"context_length": 48, "width": 64, "heads": 2, "layers": 2}  # vocab_size comes from the tokenizer
MEAN, STD = 0.25, 0.35
FILES = ("open_clip_config.json", "open_clip_model.safetensors", "bpe_simple_vocab.txt.gz")

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
GARMENTS = ["T-shirt", "trousers", "pullover", "dress", "coat"]
GARMENTS += ["sandal", "shirt", "sneaker", "bag", "ankle boot"]
KANA = ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]

# Prompt templates: for all sets, then for each.
ANY = ["{}", "a {}.", "the {}.", "a photo of a {}.", "a photo of the {}.", "a blurry photo of a {}."]
DIGIT = ['a photo of the number: "{}".', "a photo of the number {}.", "a photo of the digit {}."]
DIGIT += ["a handwritten {}.", "the handwritten digit {}.", "a low resolution image of the number {}."]
GARMENT = ["a photo of {} for sale.", "a catalogue picture of a {}.", "a type of clothing: {}."]
LETTER = ["a handwritten {}.", "a drawing of the {}.", "a photo of the {}, written by hand."]

Arrays = tuple[np.ndarray, np.ndarray]
Names = tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """One pretraining set: images, and the names and templates of its prompts.

    Args:
        images: uint8, shape ``(num_images, 28, 28)``, bright ink on a dark ground.
        labels: int64, shape ``(num_images,)``.
        names: for every class the names a prompt may use for it; the first one is the usual one.
        templates: prompts with "{}" for the name.
        share: part of every batch.
    """

    images: Tensor
    labels: Tensor
    names: list[Names]
    templates: list[str]
    share: float


def read_idx(path: Path) -> np.ndarray:
    """Read MNIST's idx format."""
    raw = path.read_bytes()
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def read_mnist(root: Path, *, train: bool) -> Arrays:
    """Return images and labels of a set in torchvision's MNIST layout."""
    stem = "train" if train else "t10k"
    images = read_idx(root / "raw" / f"{stem}-images-idx3-ubyte")
    return images, read_idx(root / "raw" / f"{stem}-labels-idx1-ubyte").astype(np.int64)


def read_npz(path: Path, *, train: bool) -> Arrays:
    """Return images and labels of a file with MedMNIST's keys."""
    stem = "train" if train else "test"
    with np.load(path, allow_pickle=False) as data:
        return data[f"{stem}_images"], data[f"{stem}_labels"].reshape(-1)


def read_omniglot(folder: Path) -> tuple[np.ndarray, np.ndarray, list[Names]]:
    """Return Omniglot at 28 px, with strokes as thick as MNIST's; alphabets in both archives count once."""
    images, labels = [], []
    classes: dict[str, int] = {}
    source: dict[str, Path] = {}
    for archive in sorted(folder.glob("*.zip")):
        with zipfile.ZipFile(archive) as handle:
            for file in sorted(name for name in handle.namelist() if name.endswith(".png")):
                _, alphabet, character, _ = file.split("/")
                if source.setdefault(alphabet, archive) != archive:
                    continue
                word = alphabet.strip(")").replace("_(", " ").replace("_", " ").lower()
                labels.append(classes.setdefault(f"{word} character {int(character[-2:])}", len(classes)))
                grey = np.asarray(Image.open(io.BytesIO(handle.read(file))).convert("L"), np.float32)
                thick = F.max_pool2d(torch.from_numpy(1 - grey / 255)[None, None], 5, 1, 2)
                small = F.interpolate(thick, size=(28, 28), mode="bilinear", antialias=True)[0, 0]
                images.append((small / small.max() * 255).round().to(torch.uint8).numpy())
    return np.stack(images), np.array(labels), [(name,) for name in classes]


def load_groups(data: Path) -> list[Group]:
    """Read the four pretraining sets."""
    mnist = read_mnist(data / "MNIST", train=True)
    fashion = read_mnist(data / "FashionMNIST", train=True)
    kmnist = read_npz(data / "kmnist10k.npz", train=True)
    *omniglot, characters = read_omniglot(data / "omniglot")
    numbers: list[Names] = [(word, word, word, str(digit)) for digit, word in enumerate(DIGITS)]

    def group(arrays: Iterable[np.ndarray], names: list[Names], templates: list[str], share: float) -> Group:
        # Copied, as the arrays may be read-only.
        images, labels = (torch.from_numpy(np.array(array)) for array in arrays)
        return Group(images, labels, names, templates, share)

    return [
        group(mnist, numbers, ANY + DIGIT * 2, 0.40),
        group(fashion, [(name,) for name in GARMENTS], ANY + GARMENT, 0.20),
        group(kmnist, [(f"kana {name}",) for name in KANA], ANY + LETTER, 0.15),
        group(omniglot, characters, ANY + LETTER, 0.25),
    ]


def augment(x: Tensor, rng: torch.Generator, *, coarse: float) -> Tensor:
    """Rewrite images in another hand, with another pen, by another scanner.

    Args:
        x: shape ``(batch, 1, 28, 28)``, values in [0, 1].
        rng: source of all randomness.
        coarse: share of images that are reduced to 8 x 8 cells and scaled up again.
    """
    num = len(x)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(num, *(shape or (1, 1, 1)), generator=rng)

    # Hand: rotation, shear, size, aspect, position, and a smooth random displacement.
    angle, shear = uniform(-0.35, 0.35, 1), uniform(-0.35, 0.35, 1)
    size, aspect = torch.exp(uniform(-0.2, 0.38, 1)), torch.exp(uniform(-0.25, 0.25, 1))
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = torch.cat([cos / (size * aspect), (sin + shear) / size, uniform(-0.15, 0.15, 1)], 1)
    columns = torch.cat([-sin / (size * aspect), cos / size, uniform(-0.12, 0.12, 1)], 1)
    grid = F.affine_grid(torch.stack([rows, columns], 1), [num, 1, 28, 28], align_corners=False)
    bend = torch.randn(num, 2, 4, 4, generator=rng) * uniform(0.0, 0.09)
    grid = grid + F.interpolate(bend, size=(28, 28), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    x = F.grid_sample(x, grid, align_corners=False)

    # Pen: thicker for some images, thinner for others, by a part of a pixel.
    pen = uniform(-0.6, 1.0)
    thick, thin = F.max_pool2d(x, 3, 1, 1), -F.max_pool2d(-x, 3, 1, 1)
    x = x + pen.clamp(min=0) * (thick - x) + (-pen).clamp(min=0) * 0.8 * (thin - x)

    # Scanner: few cells of few levels, low resolution, blur, contrast, noise, and sometimes a negative.
    order = torch.randperm(num, generator=rng)
    cells = order[: int(num * coarse)]
    low = order[len(cells) : len(cells) + num // 8]
    x[cells] = count_cells(x[cells], uniform(0.25, 0.6)[cells])
    side = int(torch.randint(7, 16, (1,), generator=rng))
    x[low] = resize(F.adaptive_avg_pool2d(x[low], side))
    blurred = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = torch.lerp(x, blurred, uniform(-0.3, 0.8).clamp(min=0))
    x = x.clamp(1e-4, 1.0) ** torch.exp(uniform(-0.4, 0.4)) * uniform(0.7, 1.0)
    x = x + uniform(-0.2, 0.1).clamp(min=0)
    x = x + torch.randn(x.shape, generator=rng) * uniform(-0.04, 0.06).clamp(min=0)
    x = torch.where(uniform(0, 1) < 0.08, 1.0 - x, x)
    return x.clamp(0.0, 1.0)


def resize(x: Tensor) -> Tensor:
    """Scale to 28 px as the eval transform does (antialias selects Pillow's bicubic kernel)."""
    return F.interpolate(x, size=(28, 28), mode="bicubic", antialias=True).clamp(0.0, 1.0)


def count_cells(x: Tensor, threshold: Tensor) -> Tensor:
    """Binarise on a 32 x 32 raster and count ink in 4 x 4 cells: 8 x 8 cells of 17 levels."""
    ink = torch.sigmoid((F.interpolate(x, size=(32, 32), mode="bilinear") - threshold) * 20.0)
    return resize((F.avg_pool2d(ink, 4) * 16).round() / 16)


def encode_text(model: CLIP, tokens: Tensor) -> Tensor:
    """Encode prompts, unit length, without the padding that open_clip's own method carries along."""
    length = int(tokens.argmax(1).max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return F.normalize(x[torch.arange(len(x)), tokens.argmax(1)] @ model.text_projection, dim=-1)


def write_tokenizer(groups: list[Group], out: Path) -> open_clip.SimpleTokenizer:
    """Write a vocabulary in which every word of the prompts is one token; any other word is spelled.

    Byte pair encoding, run until nothing is left to merge. The layout is open_clip's: a header, then a merge
    a line.
    """
    parts = [part for g in groups for part in [*g.templates, *(name for names in g.names for name in names)]]
    spelled = sorted(set(re.findall("[a-z]+", " ".join(parts).lower())))
    words = [[*word[:-1], word[-1] + "</w>"] for word in spelled]
    merges: list[str] = []
    while pairs := Counter(pair for word in words for pair in itertools.pairwise(word)):
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(f"{left} {right}")
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if word[i : i + 2] == [left, right]:
                    word[i : i + 2] = [left + right]
    path = out / FILES[2]
    # No newline at the end: it would count as a merge. mtime=0: the same bytes every time.
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *merges]).encode(), mtime=0))
    return open_clip.SimpleTokenizer(bpe_path=str(path), context_length=TEXT["context_length"])


def pretrain(groups: list[Group], tokenizer: open_clip.SimpleTokenizer, args: argparse.Namespace) -> CLIP:
    """Train both towers; an epoch is 60 000 images drawn from the groups by their shares."""
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    model = CLIP(EMBED_DIM, dict(VISION), {**TEXT, "vocab_size": tokenizer.vocab_size}).train()
    # Every prompt of every class, tokenised once: tokens[class] is (num_prompts, context_length).
    classes_of = [(i, names, g.templates) for i, g in enumerate(groups) for names in g.names]
    tokens = [tokenizer([t.format(name) for t in ts for name in names]) for _, names, ts in classes_of]
    owner = torch.tensor([i for i, _, _ in classes_of])
    common = (owner < 3).nonzero()[:, 0]  # the three small label sets take part in every contrast
    # One free vector a class: from them the image tower learns from the first step on, while the text tower
    # is still learning to read. They are thrown away at the end.
    anchors = torch.nn.Parameter(torch.randn(len(tokens), EMBED_DIM, generator=rng))
    matrices = {"params": [anchors, *(p for p in model.parameters() if p.ndim > 1)], "weight_decay": 0.05}
    vectors = {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], betas=(0.9, 0.98))
    steps = max(1, round(args.epochs * 60_000 / args.batch))
    begin, losses, hits = time.perf_counter(), [], []
    for step in range(steps):
        ramp = min(1.0, (step + 1) / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for parameters in optimizer.param_groups:
            parameters["lr"] = args.lr * ramp
        x, y = draw(groups, args.batch, rng)
        x = (augment(x, rng, coarse=args.coarse) - MEAN) / STD
        classes = torch.unique(torch.cat([common, y]))
        drawn = [tokens[c] for c in classes.tolist()]
        prompts = [choices[int(torch.randint(len(choices), (1,), generator=rng))] for choices in drawn]

        image = model.encode_image(x.expand(-1, 3, -1, -1), normalize=True)
        text = encode_text(model, torch.stack(prompts))
        target = torch.searchsorted(classes, y)
        foreign = owner[y][:, None] != owner[classes][None]
        loss = torch.zeros(())
        for heads in (F.normalize(anchors[classes], dim=-1), text):
            # A zero-shot classifier chooses within its own label set; a little contrast across the sets keeps
            # the text space in order.
            logits = model.logit_scale.exp() * image @ heads.T
            own = logits.masked_fill(foreign, -torch.inf)
            loss = loss + F.cross_entropy(own, target) + 0.2 * F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, math.log(100.0))
        losses.append(loss.item())
        hits.append((own.argmax(1) == target).float().mean().item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            figures = f"loss {np.mean(losses[-50:]):.3f}  accuracy {np.mean(hits[-50:]):.3f}"
            print(f"step {step + 1:5d}/{steps}  {figures}  {time.perf_counter() - begin:.0f} s", flush=True)
    return model.eval()


def draw(groups: list[Group], batch: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a batch by the groups' shares: images in [0, 1], ``(batch, 1, 28, 28)``, and global class ids."""
    images, labels, offset = [], [], 0
    for group in groups:
        picks = torch.randint(len(group.labels), (round(batch * group.share),), generator=rng)
        images.append(group.images[picks])
        labels.append(group.labels[picks] + offset)
        offset += len(group.names)
    return torch.cat(images)[:, None].float() / 255, torch.cat(labels)


def save(model: CLIP, out: Path) -> None:
    """Write config and float16 weights; open_clip copies them into float32 parameters."""
    text = {**TEXT, "vocab_size": model.vocab_size}
    model_cfg = {"embed_dim": EMBED_DIM, "vision_cfg": VISION, "text_cfg": text}
    preprocess_cfg = {"size": 28, "mode": "RGB", "mean": [MEAN] * 3, "std": [STD] * 3}
    preprocess_cfg |= {"interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (out / FILES[0]).write_text(json.dumps(config, indent=2) + "\n")
    state = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, out / FILES[1], metadata={"format": "pt"})


def exams(data: Path) -> list[tuple[str, Arrays, Arrays, list[str]]]:
    """Read what the model card reports: name, training part, test part, a prompt per class for zero-shot."""

    def both(name: str) -> tuple[Arrays, Arrays]:
        read, path = (read_npz, data / f"{name}.npz") if name[0].islower() else (read_mnist, data / name)
        return read(path, train=True), read(path, train=False)

    digits = load_digits()
    grey = np.round(digits.images / 16 * 255).astype(np.uint8)
    parts = train_test_split(grey, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    numbers = [f'a photo of the number: "{name}".' for name in DIGITS]
    garments = [f"a photo of a {name}." for name in GARMENTS]
    return [
        ("MNIST", *both("MNIST"), numbers),
        ("FashionMNIST", *both("FashionMNIST"), garments),
        ("KMNIST (part)", *both("kmnist10k"), [f"a photo of the kana {name}." for name in KANA]),
        ("scikit-learn digits (held out)", (parts[0], parts[2]), (parts[1], parts[3]), numbers),
        ("notMNIST (part, held out)", *both("notmnist10k"), []),
        ("PneumoniaMNIST (part, held out)", *both("pneumoniamnist"), []),
    ]


@torch.inference_mode()
def evaluate(data: Path, out: Path) -> None:
    """Load the folder as any user would, and print the table of the model card (GitHub markdown).

    Zero-shot: one prompt a class, test part (scikit-learn's digits: all images, none was trained on). Linear
    probe: logistic regression on at most 8 000 training images, of embeddings and of 14 x 14 pixels.
    """
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}", bpe_path=str(out / FILES[2]))

    def embed(images: np.ndarray) -> np.ndarray:
        batches = [images[i : i + 500] for i in range(0, len(images), 500)]
        inputs = (torch.stack([preprocess(Image.fromarray(image)) for image in batch]) for batch in batches)
        return np.concatenate([model.encode_image(x, normalize=True).numpy() for x in inputs])

    def pixels(images: np.ndarray) -> np.ndarray:
        side = min(14, images.shape[1])
        return F.adaptive_avg_pool2d(torch.from_numpy(np.array(images)).float(), side).flatten(1).numpy()

    def probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray, answers: np.ndarray) -> str:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
        return f"{100 * classifier.fit(train, labels).score(test, answers):.1f} %"

    print("| data set | zero-shot | linear probe | the same probe on pixels |\n|---|---|---|---|")
    for title, (train, labels), (test, answers), prompts in exams(data):
        keep = np.random.default_rng(0).permutation(len(train))[:8000]  # some sets are sorted by class
        seen, new = embed(train[keep]), embed(test)
        figures = ["-", probe(seen, labels[keep], new, answers)]
        figures.append(probe(pixels(train[keep]), labels[keep], pixels(test), answers))
        if prompts:
            text = model.encode_text(tokenizer(prompts), normalize=True).numpy()
            shown, truth = new, answers
            if "digits" in title:
                shown, truth = np.concatenate([seen, new]), np.concatenate([labels[keep], answers])
            figures[0] = f"{100 * np.mean((shown @ text.T).argmax(1) == truth):.1f} %"
        print(f"| {title} | {' | '.join(figures)} |", flush=True)
    tower, total = (sum(p.numel() for p in part.parameters()) for part in (model.visual, model))
    size = sum((out / name).stat().st_size for name in FILES)
    print(f"\nparameters: {total:,}, of which image tower: {tower:,}; bytes of the three files: {size:,}")


def main() -> None:
    """Parse the command line, pretrain (unless --evaluate), evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the data sets (layout: the model card)")
    add("--out", type=Path, required=True, help="folder of the model")
    add("--epochs", type=float, default=7, help="epochs of 60 000 images (default: 7)")
    add("--batch", type=int, default=256, help="images per step (default: 256)")
    add("--lr", type=float, default=2e-3, help="peak learning rate of AdamW (default: 2e-3)")
    add("--coarse", type=float, default=0.3, help="share reduced to 8 x 8 cells (default: 0.3)")
    add("--seed", type=int, default=0, help="of weights, sampling and augmentation (default: 0)")
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")
    add("--evaluate", action="store_true", help="train nothing, print the figures of --out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.evaluate:
        args.out.mkdir(parents=True, exist_ok=True)
        groups = load_groups(args.data)
        save(pretrain(groups, write_tokenizer(groups, args.out), args), args.out)
    evaluate(args.data, args.out)


if __name__ == "__main__":
    main()
