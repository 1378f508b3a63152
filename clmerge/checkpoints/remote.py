"""Read checkpoints that a URL names: from a copy on this machine, since they are mapped into memory."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from clmerge.files import is_url
from clmerge.names import tell


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return a path of the file system; what a URL names is copied into the cache, unless it is there unchanged.

    The cache is ``clmerge/fetched`` in ``$XDG_CACHE_HOME``, by default ``~/.cache``.

    Args:
        path: A path, or a URL of any file system that fsspec knows: ``s3://``, ``gs://``, ``https://``, ``memory://``.

    Raises:
        FileNotFoundError: If there is nothing at the URL.
        ValueError: If fsspec does not know the file system, or a package for it is missing.
    """
    if not isinstance(path, str) or not is_url(path):
        return Path(path)
    from fsspec.core import url_to_fs

    try:
        system, inside = url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ValueError(f"expected a path, or a URL that fsspec can read, got {path}: {error}") from error
    if not system.exists(inside):
        raise FileNotFoundError(f"expected a checkpoint, got {path}, which does not exist")
    name = str(inside).rstrip("/").rpartition("/")[2]
    state = [path, sorted((file, system.ukey(file)) for file in system.find(inside))]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clmerge" / "fetched"
    folder = cache / hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]
    if not folder.is_dir():
        tell(f"copying {path} to {folder / name}")
        _copy(system, inside, folder, name)
    return folder / name


def _copy(system: Any, inside: str, folder: Path, name: str) -> None:
    """Make a folder with a copy in it; it is there as a whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".", suffix=".tmp"))
    try:
        system.get(inside, str(temporary / name), recursive=system.isdir(inside))
        if not folder.is_dir():
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
