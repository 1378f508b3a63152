"""A LightningModule of a stranger with a backbone and a head, and the formula of its merges."""

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional


class BackboneModule(LightningModule):
    """A backbone and a head; it remembers all weights that it was evaluated with, batch by batch."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.head = nn.Linear(6, 3)
        self.inside = []

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        if self.trainer.state.fn == "validate":
            self.inside.append(weights(self))
        self.log("val/loss", functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.inside.append(weights(self))

    def predict_step(self, batch, batch_idx):
        self.inside.append(weights(self))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def weights(model):
    """Return copies of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def magmax(base, taus, *, scale):
    """Return theta_0 plus the entries of largest magnitude; the later task wins ties."""
    merged = {}
    for name, start in base.items():
        stacked = torch.stack([tau[name] for tau in reversed(taus)])
        winner = stacked.abs().argmax(dim=0, keepdim=True)
        merged[name] = start + scale * stacked.gather(0, winner)[0]
    return merged
