"""Backbones and heads; open_clip and timm are imported when a backbone is built."""

from clmerge.models.backbone import Backbone, OpenClip, Timm
from clmerge.models.heads import CosineHead, Head, LinearHead, ZeroShotHead

__all__ = ["Backbone", "CosineHead", "Head", "LinearHead", "OpenClip", "Timm", "ZeroShotHead"]
