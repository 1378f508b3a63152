"""Checkpoints on disk: read tensor by tensor, written tensor by tensor, whatever their size."""

from clmerge.checkpoints.formats import open_checkpoint, open_models
from clmerge.checkpoints.reader import Checkpoint, Entry
from clmerge.checkpoints.writer import SafetensorsWriter

__all__ = ["Checkpoint", "Entry", "SafetensorsWriter", "open_checkpoint", "open_models"]
