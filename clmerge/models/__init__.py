"""Backbones, heads and modes of tuning; open_clip and timm are imported when a backbone is built."""

from clmerge.models.backbone import Backbone, OpenClip, Timm
from clmerge.models.classifier import Classifier
from clmerge.models.heads import CosineHead, Head, LinearHead, ZeroShotHead
from clmerge.models.tuning import (
    IA3,
    Adapters,
    Frozen,
    Full,
    Linearized,
    LinearizedLoRA,
    LoRA,
    Partial,
    TangentModule,
    Tuning,
    add_adapters,
    add_ia3,
    add_lora,
)

__all__ = [
    "IA3",
    "Adapters",
    "Backbone",
    "Classifier",
    "CosineHead",
    "Frozen",
    "Full",
    "Head",
    "LinearHead",
    "Linearized",
    "LinearizedLoRA",
    "LoRA",
    "OpenClip",
    "Partial",
    "TangentModule",
    "Timm",
    "Tuning",
    "ZeroShotHead",
    "add_adapters",
    "add_ia3",
    "add_lora",
]
