"""What is in a checkpoint: format, tensors by their first names, ledger; nothing in the file is executed."""

import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clmerge.checkpoints.formats import open_checkpoint
from clmerge.checkpoints.ledger import KEY, ledger_file, read_ledger
from clmerge.checkpoints.reader import Checkpoint
from clmerge.results.model_facts import ModelFacts
from clmerge.weights.tensor_files import load_metadata

_MOST_PARTS = 12


def summarize(path: str | os.PathLike[str], weights: str | None = None) -> dict[str, Any]:
    """Return what a checkpoint holds, in JSON types.

    Args:
        path: A file or folder, as for ``open_checkpoint``.
        weights: Which set is read of a file that holds several.

    Returns:
        ``format``, ``is_task_vector``, ``task``, ``base``, ``tensors``, ``parameters``, ``bytes``, ``dtypes`` (tensors
        by dtype), ``parts`` (tensors and parameters by the first parts of their names), ``sets`` and ``weights`` (the
        names of all sets, and of the one that is read), ``left_out`` (classes whose objects were not built), ``ledger``
        (how ``clmerge merge`` made it, without the maps of an alignment; None if it did not), and ``model`` (what a
        model file of a run says about itself; None for other files).

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        ValueError: If the format cannot be read.
    """
    found = open_checkpoint(path, weights)
    return {
        "format": found.kind,
        "is_task_vector": found.is_task_vector,
        "task": found.task,
        "base": found.base,
        "tensors": len(found),
        "parameters": sum(entry.numel for entry in found.entries.values()),
        "bytes": found.nbytes,
        "dtypes": dict(Counter(str(entry.dtype).removeprefix("torch.") for entry in found.entries.values())),
        "parts": _parts(found),
        "sets": found.sets,
        "weights": found.weights,
        "left_out": found.ignored,
        "ledger": _ledger(path),
        "model": _facts(Path(path)),
    }


def _facts(path: Path) -> dict[str, Any] | None:
    if not path.is_file() or path.suffix != ".safetensors":
        return None
    found = ModelFacts.from_metadata(load_metadata(path), str(path))
    return None if found is None else asdict(found)


def _parts(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Group the tensors by as many first parts of their names as give a dozen groups at most."""
    groups: dict[str, list[str]] = {}
    for depth in range(1, 4):
        finer: dict[str, list[str]] = {}
        for name in checkpoint.entries:
            finer.setdefault(".".join(name.split(".")[:depth]), []).append(name)
        if groups and len(finer) > _MOST_PARTS:
            break
        groups = finer
    return [
        {
            "name": name,
            "tensors": len(names),
            "parameters": sum(checkpoint.entries[one].numel for one in names),
        }
        for name, names in groups.items()
    ]


def _ledger(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    file = ledger_file(path)
    has_one = file.is_file() and (
        file.suffix == ".json" or (file.suffix == ".safetensors" and KEY in load_metadata(file))
    )
    if not has_one or (file.suffix == ".json" and f'"{KEY}"' not in Path(file).read_text(encoding="utf-8")):
        return None
    ledger = asdict(read_ledger(path))
    (ledger["alignment"] or {}).pop("maps", None)
    return ledger
