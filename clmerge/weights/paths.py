"""The kind of file at a path, checked before opening: reading a pipe blocks, reading a device may never end."""

import os
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISREG, "file"),
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "named pipe"),
    (stat.S_ISSOCK, "socket"),
)


def what_it_is(path: str | os.PathLike[str]) -> str:
    """Return ``"file"``, ``"folder"``, ``"named pipe"``, ``"socket"`` or ``"device"``; links are followed.

    Returns ``"nothing"`` if the path does not exist or cannot: a broken or circular link, a name with a null byte.

    Example:
        >>> what_it_is("/dev/null"), what_it_is("/")
        ('device', 'folder')
    """
    try:
        mode = Path(path).stat().st_mode
    except PermissionError:
        return "path that may not be read"
    except (OSError, ValueError):
        return "nothing"
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), "device")
