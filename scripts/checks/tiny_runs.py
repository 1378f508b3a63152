"""Streams, configurations and checkpoints of a few kilobytes, for commands that are run hundreds of times."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

CONFIG = """\
name: tiny
seed: 0
stream:
  class_path: ClassIncremental
  init_args: {{source: {{class_path: NpzSource, init_args: {{path: {data}, templates: generic}}}}, num_tasks: 3}}
model:
  backbone: {{class_path: OpenClip, init_args: {{name: "{backbone}"}}}}
  loss_classes: all
  optimizer: {{class_path: AdamW, init_args: {{lr: 0.003}}}}
mergers: [MagMax, RandomMix]
data: {{batch_size: 8}}
learner: {{start_policy: merged}}
trainer: {{max_epochs: 2, accelerator: cpu, log_every_n_steps: 1}}
logging: {{wandb: false, csv: false}}
"""
# What a fit is made of, by the name of the variant.
VARIANTS = {
    "fit": {},
    "branches": {"learner: {start_policy: merged}": "learner: {start_policy: previous, branches: 2}"},
    "statistics": {"[MagMax, RandomMix]": "[Fisher, RegMean]", "start_policy: merged": "start_policy: base"},
}


def write_configs(folder, *, per_class=4, classes=6):
    """Write a stream of three tasks of one batch each, a CLIP of two layers, and a configuration per variant."""
    from support.tiny import tiny_clip

    write_images(folder / "data.npz", per_class=per_class, classes=classes)
    whole = CONFIG.format(data=folder / "data.npz", backbone=tiny_clip(folder / "clip"))
    for name, changes in VARIANTS.items():
        text = whole
        for old, new in changes.items():
            assert old in text, old
            text = text.replace(old, new)
        (folder / f"{name}.yaml").write_text(text)


def write_images(file, *, per_class, classes, seed=0, side=8):
    """Write noise with labels in the format of NpzSource."""
    import numpy as np

    rng, labels = np.random.default_rng(seed), np.arange(classes)
    np.savez(
        file,
        train_images=rng.integers(0, 255, (per_class * classes, side, side), dtype=np.uint8),
        train_labels=np.tile(labels, per_class),
        test_images=rng.integers(0, 255, (classes, side, side), dtype=np.uint8),
        test_labels=labels,
        classes=np.array([f"thing {number}" for number in labels]),
    )


def write_models(folder, *, layers=8, side=64):
    """Write a base, two models that were trained from it."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    base = {f"layer.{number}.weight": torch.randn(side, side, generator=generator) for number in range(layers)}
    save_file(base, folder / "base.safetensors")
    for number in range(2):
        save_file(
            {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in base.items()},
            folder / f"m{number}.safetensors",
        )
