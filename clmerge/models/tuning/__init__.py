"""Modes of tuning: which weights are trained, and which parameters are trained in their place."""

from clmerge.models.tuning.adapters import Adapters, add_adapters
from clmerge.models.tuning.ia3 import IA3, add_ia3
from clmerge.models.tuning.linearized import Linearized
from clmerge.models.tuning.linearized_lora import LinearizedLoRA
from clmerge.models.tuning.lora import LoRA, add_lora
from clmerge.models.tuning.scope import Frozen, Full, Partial
from clmerge.models.tuning.tangent import TangentModule
from clmerge.models.tuning.tuning import Tuning

__all__ = [
    "IA3",
    "Adapters",
    "Frozen",
    "Full",
    "Linearized",
    "LinearizedLoRA",
    "LoRA",
    "Partial",
    "TangentModule",
    "Tuning",
    "add_adapters",
    "add_ia3",
    "add_lora",
]
