"""Lock a folder so that only one process writes to it; the system releases the lock when the process dies."""

import errno
import fcntl
import json
import os
import socket
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from clmerge.names import tell

LOCK = ".lock"
_patience = 0.0  # seconds to wait for another process
# Descriptor and number of holders of every folder that this process has locked.
_held: dict[Path, list[int]] = {}


def hold_lock(folder: Path, holder: object) -> Callable[[], object]:
    """Lock a folder for this process until ``holder`` is gone; a process may hold it several times.

    The lock is on the file ``.lock``, which names its owner and is removed when the lock is released; a killed process
    leaves the file but not the lock. If the file system does not support locks, a note is printed to stderr.

    Args:
        folder: A folder that exists.
        holder: The lock is released when this object is garbage-collected, or when the process ends.

    Returns:
        A function that releases the lock at once.

    Raises:
        BlockingIOError: If another process has the lock; the message names it.
    """
    folder = folder.resolve()
    if folder in _held:
        _held[folder][1] += 1
    else:
        descriptor = _locked_file(folder)
        if descriptor is None:
            return lambda: None
        _held[folder] = [descriptor, 1]
    return weakref.finalize(holder, _release, folder, os.getpid())


def wait_for_locks(seconds: float) -> None:
    """Let this process wait for a folder that another one has locked, instead of refusing it at once.

    Args:
        seconds: How long.
    """
    global _patience
    _patience = seconds


def _locked_file(folder: Path) -> int | None:
    file = folder / LOCK
    until = time.monotonic() + _patience
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file(descriptor, file):
                owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(owner).encode(), 0)
                return descriptor
            os.close(descriptor)  # the previous owner has removed the file meanwhile
        except BlockingIOError:
            found = os.pread(descriptor, 1000, 0).decode("utf-8", "replace")
            os.close(descriptor)
            if time.monotonic() < until:
                time.sleep(0.2)
                continue
            raise BlockingIOError(
                errno.EAGAIN, f"expected a folder that no other process writes, got {folder}, which {_owner(found)}"
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP):
                raise
            note = f"clmerge: the file system of {folder} knows no locks: let one process at a time write there"
            tell(note)
            return None


def _owner(found: str) -> str:
    try:
        owner = json.loads(found)
        return (
            f"process {owner['pid']} on {owner['host']} has been writing since {owner['since']}: wait until it ends, "
            "or end it"
        )
    except (ValueError, KeyError, TypeError):  # the owner has not finished writing its name
        return "another process writes: wait until it ends, or end it"


def _is_file(descriptor: int, file: Path) -> bool:
    try:
        there = file.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def _release(folder: Path, owner: int) -> None:
    if os.getpid() != owner or folder not in _held:  # a forked child has closed its copy
        return
    _held[folder][1] -= 1
    if not _held[folder][1]:
        descriptor, _ = _held.pop(folder)
        if _is_file(descriptor, folder / LOCK):
            (folder / LOCK).unlink()
        os.close(descriptor)


def _close_in_child() -> None:
    """Close the locks in a forked child: workers of a data loader outlive a killed process, its locks must not."""
    for descriptor, _ in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
