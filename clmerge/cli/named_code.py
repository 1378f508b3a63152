"""Which code a file may name: what is imported for a class path, and what a class path may build.

jsonargparse imports the module of every class path before it checks the class, and importing is running. So paths are
held against a list first; and what a ``class_path`` names is built only if it is a class: a function there would be
called while the configuration is read.
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
    """Have jsonargparse refuse what runs commands or code: ``os``, ``subprocess``, ``functools`` and their like.

    Nor does it build what stands where any value may stand, and it leaves the docstrings of attributes alone.
    """
    set_parsing_settings(
        docstring_parse_attribute_docstrings=False,
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=[],  # none but jsonargparse's own, which it enforces only where a list is given
    )


@contextmanager
def importing_only(packages: Sequence[str]) -> Iterator[None]:
    """Refuse class paths outside of some packages, before anything is imported for them.

    Args:
        packages: Names of packages or modules.

    Raises:
        ValueError: If one is no name of a package.
    """
    before = _common.parsing_settings["import_path_verdicts"]
    try:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=list(packages))
        yield
    finally:
        _common.parsing_settings["import_path_verdicts"] = before  # there is no public way to take entries out again


def refused_path(message: str) -> tuple[str, str] | None:
    """Return the class path that an error message of jsonargparse refuses to import and the key it stands at, if any.

    Example:
        >>> refused_path("Importing 'os.system' is not allowed, denied by the 'os' entry")
        ('os.system', '')
    """
    if (found := _DENIED.search(message)) is None:
        return None
    keys = [key[1] for key in _KEY.finditer(message, 0, found.start())]
    return found[1], ".".join(keys)


def refuse_functions(config: Any, key: str = "") -> None:
    """Refuse every ``class_path`` that is no class: jsonargparse would call a function that it names.

    Args:
        config: What was parsed; the modules of its class paths are imported.
        key: Where it stands.

    Raises:
        ValueError: If there is one.
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
    """Return what a dotted path names if its module is imported, None otherwise; nothing is imported."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:length]))
        if found is not None:
            for name in parts[length:]:
                found = getattr(found, name, None)
            return found
    return None
