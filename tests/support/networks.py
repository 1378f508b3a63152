"""Small networks with random gains, biases and running statistics: ones and zeros would hide errors of a map."""

import timm
import torch
import torchvision
from torch import nn

from clmerge.models import OpenClip


def nano():
    return OpenClip("nano").model.visual, 28


def vit(**options):
    given = {"num_classes": 7, "img_size": 32, "depth": 2} | options
    return timm.create_model("vit_tiny_patch16_224", **given), 32


NETWORKS = {
    "open_clip": nano,
    "timm": vit,
    "timm features": lambda: vit(num_classes=0),
    "timm average": lambda: vit(global_pool="avg"),
    "timm query norms": lambda: vit(qk_norm=True),
    "timm inner norm": lambda: vit(scale_mlp_norm=True),
    "timm attention pool": lambda: (timm.create_model("test_vit3", num_classes=5, img_size=32), 32),
    "timm layer scale": lambda: (
        timm.create_model("vit_small_patch14_dinov2", num_classes=3, img_size=28, depth=2),
        28,
    ),
    "torchvision resnet": lambda: (torchvision.models.resnet18(num_classes=5), 32),
    "timm resnet": lambda: (timm.create_model("resnet26", num_classes=0), 32),
    "mlp": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * 64, 9),
            nn.GELU(),
            nn.Linear(9, 4),
        ),
        10,
    ),
}


@torch.no_grad()
def network(name, seed=0):
    """Return a network of ``NETWORKS`` in float64 and evaluation mode, and images for it."""
    torch.manual_seed(seed)
    module, size = NETWORKS[name]()
    module.double().eval()
    for parameter in module.parameters():
        if parameter.ndim < 2:
            parameter.add_(0.3 * torch.randn_like(parameter))
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.add_(0.3 * torch.rand_like(buffer))
    return module, torch.randn(3, 3, size, size, dtype=torch.float64)


@torch.no_grad()
def error(module, images, state):
    """Return the relative change of the outputs with other weights."""
    outputs = module(images)
    changed = torch.func.functional_call(module, state, (images,))
    return float((outputs - changed).norm() / outputs.norm())
