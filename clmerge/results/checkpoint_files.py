"""Lightning's checkpoints in a run folder: complete or not there, and read with doubt."""

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

    Lightning's own atomic save goes through the system's temporary folder, where the final move can be a copy
    that a kill leaves half done, and it does not flush.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Save ``checkpoint`` to ``path``, or leave what was there.

        Raises:
            TypeError: For ``storage_options``, which a local file does not have.
        """
        if storage_options is not None:
            raise TypeError(f"expected no storage_options for {type(self).__name__}, got {storage_options!r}")
        save_torch(path, checkpoint)


def damage(path: Path) -> str | None:
    """Return what is wrong with a file that ``torch.save`` wrote; None if it is whole.

    Args:
        path: The file; all of it is read, and the checksums that the format keeps are compared. They cover content; of
            names and offsets, PyTorch's own reader is asked.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            return f"bad checksum of {broken}"
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:  # whole, with objects that somebody's callback keeps
        return None
    except Exception as error:  # readers of a damaged archive raise about anything
        return str(error).partition("\n")[0] or type(error).__name__
    return None
