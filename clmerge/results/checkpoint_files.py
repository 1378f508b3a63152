"""Lightning's checkpoints in a run folder: written atomically, checked for damage before use."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from clmerge.weights import save_torch


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write Lightning's checkpoints to a temporary file in the same folder, flush it, and rename it.

    Lightning's own atomic save writes to the system's temporary folder, so the final move can be a copy that a kill
    interrupts, and it does not flush.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Save ``checkpoint`` to ``path``; on failure an existing file stays unchanged.

        Raises:
            TypeError: For ``storage_options``, which a local file does not have.
        """
        if storage_options is not None:
            raise TypeError(f"expected no storage_options for {type(self).__name__}, got {storage_options!r}")
        save_torch(path, checkpoint)


def damage(path: Path) -> str | None:
    """Return the damage found in a file that ``torch.save`` wrote, as text; None if it is intact.

    Args:
        path: The file. All of it is read and the checksums of the format are compared; they cover content only, so
            names and offsets are checked by PyTorch's own reader.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            return f"bad checksum of {broken}"
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:  # intact, with objects that a callback saved
        return None
    except Exception as error:  # readers of a damaged archive raise almost any error
        return str(error).partition("\n")[0] or type(error).__name__
    return None
