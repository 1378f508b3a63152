"""Files that are either the old ones or the new ones: safetensors, text and JSON, replaced atomically."""

import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from clmerge.weights.task_vector import State, TaskVector


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name; the file written there becomes ``path`` when the block ends well.

    The data and the folder entry are flushed to disk before the block is left. When the block raises, the
    temporary file is removed and ``path`` keeps its old content. A process that is killed leaves ``path``
    untouched and may leave a hidden ``.NAME.HEX.tmp`` file.

    Args:
        path: Where the finished file shall be; missing folders are created.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_path(Path(folder, "a.txt")) as temporary:
        ...         size = temporary.write_text("done")
        ...     os.listdir(folder)
        ['a.txt']
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync(target.parent)


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str], *, replaces: Callable[[str], bool] = lambda name: False, last: str = ""
) -> Iterator[Path]:
    """Yield a temporary folder; what is written there is in ``path`` when the block ends well.

    A folder that does not exist appears at once. In one that exists the files that ``replaces`` names are removed, the
    new ones are moved in, ``last`` after all others: a folder without it is incomplete. When the block raises, ``path``
    stays as it was. A process that is killed may leave a hidden ``.NAME.HEX.tmp`` folder.

    Args:
        path: The folder; missing parents are created.
        replaces: Whether a file of an existing folder is one to remove, by its name.
        last: The file that is removed first and moved in last.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with atomic_folder(Path(parent, "a")) as temporary:
        ...         size = (temporary / "b.txt").write_text("done")
        ...     os.listdir(Path(parent, "a"))
        ['b.txt']
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            _fsync(file)
        _fsync(temporary)
        if target.is_dir():
            old = [file for file in target.iterdir() if replaces(file.name)]
            for file in sorted(old, key=lambda file: file.name != last):
                file.unlink()
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == last):
                file.replace(target / file.name)
            _fsync(target)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _fsync(target.parent)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write text as UTF-8; a reader sees the old file or the new one, never a part.

    Args:
        path: The file to write.
        text: Its new content.
    """
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write bytes; a reader sees the old file or the new one, never a part.

    Args:
        path: The file to write.
        data: Its new content.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> None:
    """Write an object as indented JSON, atomically.

    Args:
        path: The file to write.
        obj: Anything ``json.dumps`` accepts.

    Raises:
        ValueError: If ``obj`` holds NaN or Infinity; the old file stays.
    """
    write_text_atomic(path, json.dumps(obj, indent=2, allow_nan=False) + "\n")


def save_tensors(path: str | os.PathLike[str], tensors: State, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, atomically.

    Args:
        path: The file to write.
        tensors: Tensors by name; any device and layout. Tensors that share storage are written one by one.
        metadata: Strings kept in the file's header.
    """
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        # The format refuses tensors that share memory, and would write the whole storage behind a small view.
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        plain[name] = tensor
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        save_file(plain, temporary, metadata=dict(metadata) if metadata is not None else None)
        temporary.chmod(mode)  # safetensors lets nobody but the owner read its files, whatever the umask says
        _sort_metadata(temporary)


def load_tensors(path: str | os.PathLike[str]) -> TaskVector:
    """Read all tensors of a safetensors file to the CPU.

    Args:
        path: The file to read.

    Returns:
        Tensors by name.

    Raises:
        ValueError: If the file is not a whole safetensors file.
    """
    try:
        tensors: dict[str, Tensor] = load_file(os.fspath(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"expected a safetensors file, got {os.fspath(path)!r}: {error}") from error
    return tensors


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the header's strings of a safetensors file, without its tensors.

    Args:
        path: The file to read.

    Returns:
        The metadata; empty if the file has none.

    Raises:
        ValueError: If the file is not a whole safetensors file.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"expected a safetensors file, got {os.fspath(path)!r}: {error}") from error


def parse_json(text: str | bytes, source: str) -> Any:
    """Return what JSON text from elsewhere says.

    Args:
        text: The text; bytes are UTF-8.
        source: What it is called in messages.

    Raises:
        ValueError: If it is no JSON, or is nested too deeply to be read.

    Example:
        >>> parse_json("[1]", "a.json")
        [1]
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON, got {source}: {error}") from error


def _sort_metadata(path: Path) -> None:
    """Put the header's strings in order: safetensors writes a random one, and equal files must be equal."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if len(text) <= size:  # the same characters in another order, then the padding
                file.seek(8)
                file.write(text.ljust(size))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
