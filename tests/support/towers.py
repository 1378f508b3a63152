"""Small image towers of every kind of attention that tuning must reach."""

import timm
import torch
from support.tiny import tiny_clip

from clmerge.models import OpenClip


def clip_tower(folder):
    return OpenClip(tiny_clip(folder)).model.visual.eval(), 8


def timm_tower(folder):
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0, img_size=32).eval(), 32


def eva_tower(folder):
    """Its attention reads ``qkv.weight`` and never calls the layer."""
    torch.manual_seed(0)
    model = timm.models.eva.Eva(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2, num_classes=0)
    return model.eval(), 16


TOWERS = [clip_tower, timm_tower, eva_tower]


def shake(module, marks=("lora_", "ia3", "adapter_"), seed=1):
    """Give all inner parameters values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(mark in name for mark in marks):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def images(size, dtype=torch.float32):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2)).to(dtype)
