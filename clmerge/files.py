"""Write files, folders, text and JSON atomically: a reader sees the old content or the new one, never a part."""

import json
import os
import re
import shutil
import socket
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_DEAD_AFTER = 24 * 3600.0  # seconds without a write, where it cannot be checked whether the process is alive
_NUMBERS = frozenset({int, float, bool, type(None)})  # types in a list that is written on one line
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*(::[a-zA-Z][a-zA-Z0-9+.-]*)*://")
_in_use: set[str] = set()


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL for fsspec.

    Example:
        >>> is_url("s3://bucket/model.safetensors"), is_url("models/a.safetensors")
        (True, False)
    """
    return isinstance(path, str) and _URL.match(path) is not None


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name; the file written there becomes ``path`` when the block ends without an error.

    The data and the folder entry are flushed to disk before the block is left. When the block raises, the
    temporary file is removed and ``path`` keeps its old content. A process that is killed leaves ``path``
    untouched and may leave a hidden ``.NAME.HEX.tmp`` file, which the next process that writes ``path`` removes.

    Args:
        path: The finished file; missing folders are created.

    Raises:
        OSError: If the file cannot be written, for example because the disk is full; the error names ``path``.

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
    with _temporary_name(target) as temporary:
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
    """Yield a temporary folder; its files are in ``path`` when the block ends without an error.

    A new folder is created in one step. In an existing folder, the files that ``replaces`` selects are removed and the
    new files are moved in, ``last`` after all others: a folder without it is incomplete. When the block raises,
    ``path`` stays unchanged. A process that is killed may leave a hidden ``.NAME.HEX.tmp`` folder.

    Args:
        path: The folder; missing parents are created.
        replaces: Returns, given the name of a file in an existing folder, whether to remove it.
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
    with _temporary_name(target) as temporary:
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


@contextmanager
def _temporary_name(target: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``target`` that holds host and process; system errors in the block name the target.

    Temporary files that dead processes have left beside ``target`` are removed first.
    """
    _remove_leftovers(target)
    owner = f"{_host()}{os.getpid():08x}"
    temporary = target.with_name(f".{target.name}.{owner}{uuid.uuid4().hex[:16]}.tmp")
    _in_use.add(temporary.name)
    try:
        yield temporary
    except OSError as error:
        if error.errno is None or not str(error.filename or temporary).startswith(str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        _in_use.discard(temporary.name)


def _remove_leftovers(target: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.([0-9a-f]{{8}})([0-9a-f]{{8}})[0-9a-f]{{16}}\.tmp")
    with os.scandir(target.parent) as entries:
        names = [entry.name for entry in entries]  # not paths: in the folder of a long stream there are thousands
    for name in names:
        match = pattern.fullmatch(name)
        if match and _is_dead(found := target.parent / name, host=match[1], process=int(match[2], 16)):
            shutil.rmtree(found, ignore_errors=True) if found.is_dir() else found.unlink(missing_ok=True)


def _is_dead(found: Path, *, host: str, process: int) -> bool:
    """Return whether the process that wrote a temporary file has ended, as far as this process can tell."""
    if host == _host():
        if process == os.getpid():
            return found.name not in _in_use
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            pass
    try:
        return time.time() - found.stat().st_mtime > _DEAD_AFTER
    except FileNotFoundError:
        return False


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


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
    """Write an object as indented JSON, atomically; lists of numbers are on one line.

    Args:
        path: The file to write.
        obj: Anything ``json.dumps`` accepts.

    Raises:
        ValueError: If ``obj`` holds NaN or Infinity; the old file stays.
    """
    write_text_atomic(path, _indented(obj, "\n") + "\n")


def _indented(obj: Any, line: str) -> str:
    """Return JSON with two spaces per level; json's own indentation takes ten times as long for matrices.

    Args:
        obj: The object.
        line: A line end and the indentation of the object.
    """
    if isinstance(obj, dict) and obj:
        items = (
            f"{json.dumps(key if isinstance(key, str) else json.dumps(key))}: {_indented(value, line + '  ')}"
            for key, value in obj.items()
        )
        return f"{{{line}  {f',{line}  '.join(items)}{line}}}"
    if isinstance(obj, list | tuple) and not _NUMBERS.issuperset(map(type, obj)):
        return f"[{line}  {f',{line}  '.join(_indented(item, line + '  ') for item in obj)}{line}]"
    return json.dumps(obj, allow_nan=False)


def parse_json(text: str | bytes, source: str) -> Any:
    """Parse untrusted JSON text.

    Args:
        text: The text; bytes are UTF-8.
        source: Name of the text in error messages.

    Raises:
        ValueError: If it is not JSON, or is nested too deeply to be read.

    Example:
        >>> parse_json("[1]", "a.json")
        [1]
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON, got {source}: {error}") from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
