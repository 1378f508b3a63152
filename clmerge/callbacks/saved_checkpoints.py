"""Add the merge of a task to the checkpoints that were written while the task was trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from clmerge.lightning_compat import callbacks_of, is_lightning

_METADATA = "meta.pt"  # file with the state of callbacks in a sharded checkpoint, which is a folder


def keep_merge(trainer: Trainer, key: str, state: Mapping[str, Any], *, before: Sequence[str]) -> None:
    """Replace a merge callback's state in this fit's checkpoints by its state after the merge.

    ``ModelCheckpoint`` writes before the task is merged. Without this, a process that starts from ``last.ckpt`` or the
    best checkpoint would lack the merge of the task that wrote it. Weights and everything else in the files are
    unchanged; files without callback states (``save_weights_only``), and those of other fits, are skipped.

    Args:
        trainer: The Trainer that fitted the task.
        key: The callback's key.
        state: The callback's current state.
        before: Fingerprints of the task vectors merged before this fit.
    """
    if not trainer.is_global_zero:
        return
    for path in _written(trainer):
        sharded = path.is_dir()
        io = TorchCheckpointIO() if sharded else trainer.strategy.checkpoint_io
        file = path / _METADATA if sharded else path
        # This process has just written the file: what it unpickles is its own.
        checkpoint = io.load_checkpoint(file, map_location="cpu", weights_only=False)
        found = checkpoint.get("callbacks", {}).get(key)
        if found and found["pending"] and found["vectors"] == list(before):
            checkpoint["callbacks"][key] = dict(state)
            io.save_checkpoint(checkpoint, file)
        io.teardown()  # waits for a plugin that writes in the background


def read_state(path: str | Path, key: str) -> dict[str, Any]:
    """Return the state of a merge callback in a checkpoint, which may be untrusted.

    Args:
        path: A checkpoint; a file or, if it is sharded, a folder.
        key: The callback's key.

    Raises:
        ValueError: If it cannot be read without executing pickled code, or has no such state.
    """
    file = Path(path) / _METADATA if Path(path).is_dir() else Path(path)
    try:
        callbacks: dict[str, dict[str, Any]] = torch.load(file, map_location="cpu", weights_only=True).get(
            "callbacks", {}
        )
    except UnpicklingError as error:
        raise ValueError(
            f"expected a checkpoint of tensors and plain values, got {path} with pickled objects, hyper-parameters "
            "perhaps; if you trust it, load it yourself (weights_only=False) and give its "
            f"['callbacks'][{key!r}] to merge.load_accumulators"
        ) from error
    if key not in callbacks:
        raise ValueError(
            f"expected the state {key!r} in {path}, got {sorted(callbacks) or 'none, as with save_weights_only'}; "
            "use the mergers and the start policy that the checkpoint was written with"
        )
    return callbacks[key]


def _written(trainer: Trainer) -> list[Path]:
    """Return the checkpoints of the ModelCheckpoint callbacks, with links resolved."""
    paths: dict[Path, None] = {}
    for callback in callbacks_of(trainer):
        if is_lightning(callback, "ModelCheckpoint"):
            kept: Any = callback
            for path in (*kept.best_k_models, kept.best_model_path, kept.last_model_path):
                if path and Path(path).exists():
                    paths[Path(path).resolve()] = None
    return list(paths)
