"""The ledger of a merged file: its inputs and settings, stored in the file's header, so that it can be reproduced."""

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import clmerge
from clmerge.checkpoints.adapter import WEIGHTS
from clmerge.checkpoints.groups import Group
from clmerge.checkpoints.heads import Heads
from clmerge.checkpoints.reader import Checkpoint
from clmerge.checkpoints.vectors import Origin
from clmerge.files import parse_json
from clmerge.merging import Finisher, Merger, Sparsifier
from clmerge.settings import Configured
from clmerge.weights.buffers import Buffers
from clmerge.weights.tensor_files import load_metadata

SCHEMA = 1
KEY = "clmerge"
INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
ADAPTER = WEIGHTS[0]
MOST_THREADS = 1024
UNKNOWN = "0" * 64  # placeholder with the length of a SHA-256


@dataclass
class InputFile:
    """An input file: its path, the SHA-256 of its bytes (None with ``--no-hash``), and the set of weights read."""

    path: str
    bytes: int
    sha256: str | None
    weights: str = ""


@dataclass
class Ledger:
    """How a merged file was made.

    Attributes:
        merger: Class and settings, seeds included; None if tensors in no group stay the base's.
        base: Absolute path of the base model; of a link, its own path, because the target's name may be meaningless
            (as in Hugging Face's cache).
        models: Paths of the models, in the order of their tasks.
        files: Every file that was read.
        include: Patterns of tensors to merge.
        exclude: Patterns of tensors not to merge.
        strict: Whether mismatches were refused.
        without: Tasks that were left out, by name or index.
        threads: Number of PyTorch's threads; sums over whole tensors may depend on it.
        versions: Versions of the packages that computed the merge.
        result_sha256: SHA-256 of all bytes after the header (None with ``--no-hash``, and for shards).
        groups: Patterns, class and settings of every group.
        origin: Whether task vectors were merged (``"base"``) or weights (``"zero"``).
        dtype: Dtype of the result's floating-point tensors; None is the base's.
        shards: SHA-256 of every shard by file name (None with ``--no-hash``).
        weights: The requested set of weights in files with several.
        buffers: Source of the result's running statistics.
        estimated: Names of statistics estimated on images, which cannot be computed again from the files.
        images: Description of these images.
        heads: What became of class heads and vocabularies of different size.
        classes: Names of the rows of a union of class heads.
        lora_rank: Largest rank of the products, if the result is an adapter.
        alignment: How the models were carried into the base's units, if they were: aligner, groups of units and maps.
        diagnostics: What was measured: ``barriers`` of the models to the base, before and after the alignment.
    """

    merger: dict[str, Any] | None
    base: str
    models: list[str]
    files: list[InputFile]
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    strict: bool = False
    threads: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    result_sha256: str | None = None
    groups: list[dict[str, Any]] = field(default_factory=list)
    origin: Origin = "base"
    dtype: str | None = None
    shards: dict[str, str | None] = field(default_factory=dict)
    weights: str | None = None
    buffers: Buffers = "base"
    estimated: list[str] = field(default_factory=list)
    images: str | None = None
    without: list[str] = field(default_factory=list)
    heads: Heads = "base"
    classes: list[str] = field(default_factory=list)
    lora_rank: int | None = None
    alignment: dict[str, Any] | None = None
    diagnostics: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def metadata(self) -> dict[str, str]:
        """Return the ledger as strings for the header."""
        named = {"classes": json.dumps(self.classes)} if self.classes else {}
        return {"format": "pt", **named, KEY: json.dumps(asdict(self), sort_keys=True)}


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute a merge."""
    return {
        "clmerge": clmerge.__version__,
        "python": platform.python_version(),
        "safetensors": version("safetensors"),
        "torch": version("torch"),
    }


def input_files(checkpoints: Sequence[Checkpoint]) -> list[InputFile]:
    """List the files of checkpoints without repeats, with the placeholder for their SHA-256."""
    files = {file.absolute(): one.weights for one in checkpoints for file in one.files}
    return [InputFile(str(file), file.stat().st_size, UNKNOWN, weights) for file, weights in files.items()]


def read_ledger(path: str | os.PathLike[str]) -> Ledger:
    """Read the ledger of a merged file or folder.

    Args:
        path: A result of ``clmerge merge``: a file, a folder, or the index of a folder.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If the file has no ledger, or one of another version.
    """
    file = ledger_file(path)
    if not file.is_file():
        raise FileNotFoundError(f"expected a merged file, got {file}, which does not exist")
    try:
        found = _ledger_in(file)
        if found is None:
            raise ValueError("no ledger, which only what clmerge merge wrote has")
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
        if found.get("schema") != SCHEMA or isinstance(found["schema"], bool):
            raise ValueError(f"schema {str(found.get('schema'))[:20]!r} instead of {SCHEMA}")
        for key, value in found.items():
            if key not in _FITS or not _FITS[key](value):
                raise ValueError(f"{str(value)[:80]!r} under {key[:40]!r}, which merge does not write")
        found["files"] = [InputFile(**file) for file in found["files"]]
        return Ledger(**found)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"expected a ledger of this version of clmerge in {path}, got {error}") from error


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_file(value: Any) -> bool:
    if not isinstance(value, dict) or not {"path", "bytes", "sha256"} <= value.keys():
        return False
    texts = (value["path"], value["sha256"] or "", value.get("weights", ""))
    return all(isinstance(text, str) for text in texts)


def _are_diagnostics(value: Any) -> bool:
    if not isinstance(value, dict) or not value.keys() <= {"barriers"}:
        return False
    told = value.get("barriers", [])
    return isinstance(told, list) and all(
        isinstance(one, dict)
        and one.keys() == {"model", "before", "after", "moved"}
        and isinstance(one["model"], str)
        and isinstance(one["moved"], float)
        and all(isinstance(one[key], float | None) for key in ("before", "after"))
        for one in told
    )


def _are_shards(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(sha256, str | None) for sha256 in value.values()):
        return False
    return all(name and Path(name).name == name and "\0" not in name for name in value)


# Checks of a ledger's values, because ledgers are read from untrusted files.
_FITS: dict[str, Callable[[Any], bool]] = {
    "merger": lambda value: isinstance(value, dict | None),
    "base": lambda value: isinstance(value, str),
    "models": lambda value: _are_texts(value) and bool(value),
    "files": lambda value: isinstance(value, list) and all(map(_is_file, value)),
    "include": _are_texts,
    "without": _are_texts,
    "exclude": _are_texts,
    "strict": lambda value: isinstance(value, bool),
    "threads": lambda value: type(value) is int and 1 <= value <= MOST_THREADS,
    "versions": lambda value: isinstance(value, dict),
    "result_sha256": lambda value: isinstance(value, str | None),
    "groups": lambda value: isinstance(value, list) and all(isinstance(group, dict) for group in value),
    "origin": lambda value: value in ("base", "zero"),
    "dtype": lambda value: isinstance(value, str | None),
    "weights": lambda value: isinstance(value, str | None),
    "buffers": lambda value: value in get_args(Buffers),
    "estimated": _are_texts,
    "images": lambda value: isinstance(value, str | None),
    "shards": _are_shards,
    "heads": lambda value: value in get_args(Heads),
    "classes": _are_texts,
    "lora_rank": lambda value: value is None or (type(value) is int and value >= 1),
    "alignment": lambda value: isinstance(value, dict | None),
    "diagnostics": _are_diagnostics,
    "schema": lambda value: True,
}


def ledger_file(path: str | os.PathLike[str]) -> Path:
    """Return the file that holds the ledger: ``path``, or in a folder its index, its adapter or its only file."""
    path = Path(path)
    if not path.is_dir():
        return path
    return path / next((name for name in (INDEX, ADAPTER) if (path / name).is_file()), ONE_FILE)


def _ledger_in(file: Path) -> Any:
    if file.suffix == ".json":
        metadata = parse_json(file.read_bytes(), str(file))["metadata"]
        return metadata.get(KEY) if isinstance(metadata, dict) else None
    text = load_metadata(file).get(KEY)
    return None if text is None else parse_json(text, f"{KEY!r} in its header")


def configured_from(plain: dict[str, Any]) -> Merger:
    """Build a merger from the plain values that ``as_plain`` returned.

    Args:
        plain: ``{"class_path": name, "init_args": settings}``; a name must be that of a class of ``clmerge.merging``
            or of an imported subclass.

    Raises:
        ValueError: If there is no such class.

    Example:
        >>> configured_from({"class_path": "MagMax", "init_args": {"scale": 1.0}})
        MagMax(scale=1.0)
    """
    merger = built(plain)
    if not isinstance(merger, Merger):
        raise ValueError(f"expected a merger, got {merger!r}")
    return merger


def as_plain(value: Merger | Group) -> dict[str, Any]:
    """Return class and settings of a merger, or patterns and merger of a group, as plain values."""
    if isinstance(value, Group):
        return {"match": list(value.match), "merger": None if value.merger is None else as_plain(value.merger)}
    return {"class_path": type(value).__name__, "init_args": value.settings()}


def built(value: Any) -> Any:
    """Replace the description of every merger, sparsifier and finisher in plain values by the built object."""
    if isinstance(value, list):
        return [built(item) for item in value]
    if isinstance(value, dict) and value.keys() == {"match", "merger"}:
        return {key: built(item) for key, item in value.items()}
    if not (isinstance(value, dict) and value.keys() == {"class_path", "init_args"}):
        return value
    classes = _subclasses(Merger) | _subclasses(Sparsifier) | _subclasses(Finisher)
    name = value["class_path"]
    if name not in classes:
        raise ValueError(
            f"expected a class of clmerge.merging, got {name!r}; import the module that defines it, or use the "
            "version of clmerge that has it"
        )
    return classes[name](**{key: built(argument) for key, argument in value["init_args"].items()})


def _subclasses(parent: type[Configured]) -> dict[str, type[Configured]]:
    found: dict[str, type[Configured]] = {}
    for child in parent.__subclasses__():
        found |= {child.__name__: child} | _subclasses(child)
    return found
