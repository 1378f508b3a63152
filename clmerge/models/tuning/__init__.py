"""Modes of tuning: what is trained in place of, or beside, the weights themselves."""

from clmerge.models.tuning.lora import LoRA, add_lora
from clmerge.models.tuning.scope import Frozen, Full, Partial
from clmerge.models.tuning.tuning import Tuning

__all__ = ["Frozen", "Full", "LoRA", "Partial", "Tuning", "add_lora"]
