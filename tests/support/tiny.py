"""Models of a few thousand parameters that stand in for the real ones."""

import gzip
import json
from pathlib import Path

import open_clip
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

TINY_CLIP = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 8, "layers": 2, "width": 8, "head_width": 4, "patch_size": 4},
        "text_cfg": {"context_length": 32, "vocab_size": 514, "width": 8, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"},
}


def tiny_clip(folder: Path, seed: int = 0) -> str:
    """Write a CLIP of two layers in open_clip's local-folder format; return its open_clip name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(TINY_CLIP))
    with gzip.open(folder / "bpe_simple_vocab.txt.gz", "wt", encoding="utf-8") as file:
        file.write("#version: 0.2")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.CLIP(**TINY_CLIP["model_cfg"])
        for parameter in model.visual.parameters():
            if parameter.ndim > 1:  # open_clip starts so small that a few steps at this width would change nothing
                nn.init.normal_(parameter, std=0.3)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


class ForeignModule(LightningModule):
    """A plain LightningModule that has never heard of merging."""

    def __init__(self, *, lr: float = 0.1, batch_norm: bool = False) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(6) if batch_norm else nn.Identity()
        self.net = nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), nn.Linear(6, 3))
        self.lr = lr
        self.seen: list[float] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.seen.append(float(self.net[0].weight.sum()))

    def test_step(self, batch, batch_idx):
        self.seen.append(float(self.net[0].weight.sum()))

    def predict_step(self, batch, batch_idx):
        self.seen.append(float(self.net[0].weight.sum()))
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def toy_loader(seed: int, *, num: int = 24, batch_size: int = 8) -> DataLoader:
    """Random but learnable data: the label is the largest of the first three inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 4, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(dim=1)), batch_size=batch_size)
