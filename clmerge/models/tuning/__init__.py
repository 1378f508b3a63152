"""Modes of tuning: what is trained in place of, or beside, the weights themselves."""

from clmerge.models.tuning.scope import Full, Partial
from clmerge.models.tuning.tuning import Tuning

__all__ = ["Full", "Partial", "Tuning"]
