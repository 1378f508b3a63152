"""Read, merge and write checkpoints of any size, tensor by tensor."""

from clmerge.checkpoints.formats import open_checkpoint, open_models
from clmerge.checkpoints.reader import Checkpoint, Entry
from clmerge.checkpoints.writer import SafetensorsWriter

__all__ = ["Checkpoint", "Entry", "SafetensorsWriter", "open_checkpoint", "open_models"]
