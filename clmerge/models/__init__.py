"""Backbones, heads and modes of tuning; open_clip and timm are imported when a backbone is built."""

from clmerge.models.backbone import Backbone, OpenClip, Timm
from clmerge.models.heads import CosineHead, Head, LinearHead, ZeroShotHead
from clmerge.models.tuning import Frozen, Full, Linearized, LoRA, Partial, TangentModule, Tuning, add_lora

__all__ = [
    "Backbone",
    "CosineHead",
    "Frozen",
    "Full",
    "Head",
    "LinearHead",
    "Linearized",
    "LoRA",
    "OpenClip",
    "Partial",
    "TangentModule",
    "Timm",
    "Tuning",
    "ZeroShotHead",
    "add_lora",
]
