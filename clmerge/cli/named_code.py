"""Restrict which code a configuration may import and instantiate through a class path.

jsonargparse imports the module of every class path before it checks the class, and an import runs code. Paths are
therefore checked against a list of packages first. A ``class_path`` must also name a class: jsonargparse would call a
function while it reads the configuration.
"""

import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jsonargparse import Namespace, _common, set_parsing_settings

KNOWN_PACKAGES = (
    "clmerge",
    "torch",
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "timm",
    "open_clip",
    "avalanche",
    "torchvision",
    "torchmetrics",
)
_DENIED = re.compile(r"Importing '([\w.]+)' is not allowed")
_KEY = re.compile(r'Parser key "([^"]+)"')


def set_policy() -> None:
    """Have jsonargparse refuse modules that run commands or code: ``os``, ``subprocess``, ``functools`` and others.

    Also disables instantiation of classes given for arguments of type Any, and the parsing of attribute docstrings.
    """
    set_parsing_settings(
        docstring_parse_attribute_docstrings=False,
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=[],  # adds nothing, but jsonargparse enforces its own list only if one is given
    )


@contextmanager
def importing_only(packages: Sequence[str]) -> Iterator[None]:
    """Refuse class paths outside of ``packages`` during the block, before their modules are imported.

    Args:
        packages: Names of packages or modules.

    Raises:
        ValueError: If an item is not a valid package name.
    """
    before = _common.parsing_settings["import_path_verdicts"]
    try:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=list(packages))
        yield
    finally:
        _common.parsing_settings["import_path_verdicts"] = before  # there is no public way to remove entries


def refused_path(message: str) -> tuple[str, str] | None:
    """Return the class path that jsonargparse refused to import and its key, from its error message; None if none.

    Example:
        >>> refused_path("Importing 'os.system' is not allowed, denied by the 'os' entry")
        ('os.system', '')
    """
    if (found := _DENIED.search(message)) is None:
        return None
    keys = [key[1] for key in _KEY.finditer(message, 0, found.start())]
    return found[1], ".".join(keys)


def refuse_functions(config: Any, key: str = "") -> None:
    """Refuse every ``class_path`` that does not name a class: jsonargparse would call a function.

    Args:
        config: The parsed configuration; the modules of its class paths are imported.
        key: Dotted key of ``config`` in the whole configuration.

    Raises:
        ValueError: If a ``class_path`` does not name a class.
    """
    if isinstance(config, Namespace):
        config = vars(config)
    if isinstance(config, Mapping):
        path = config.get("class_path")
        if isinstance(path, str) and (found := _imported(path)) is not None and not inspect.isclass(found):
            raise ValueError(
                f"expected a class at {key}, got class_path {path!r}, which is a {type(found).__name__}: it was not "
                "called; name a class of the kind that is expected there"
            )
        for name, value in config.items():
            refuse_functions(value, f"{key}.{name}" if key else str(name))
    elif isinstance(config, list | tuple):
        for position, value in enumerate(config):
            refuse_functions(value, f"{key}[{position}]")


def _imported(path: str) -> Any:
    """Return the object of a dotted path if its module is already imported, None otherwise; imports nothing."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:length]))
        if found is not None:
            for name in parts[length:]:
                found = getattr(found, name, None)
            return found
    return None
