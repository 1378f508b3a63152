"""Objects that are their constructor arguments: settings, label and repr come from the signature."""

import inspect
import re
from typing import Any


class Configured:
    """Base of mergers, sparsifiers and finishers: every constructor argument is kept under its own name.

    That one convention gives ``settings()``, ``label`` and ``repr`` to every subclass.
    """

    name: str = ""

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments as plain values.

        Returns:
            Numbers, strings, lists and None by argument name; an argument that is itself a rule or a part
            becomes ``{"class_path": ..., "init_args": {...}}``.
        """
        return {name: _plain(getattr(self, name)) for name in inspect.signature(type(self)).parameters}

    @property
    def label(self) -> str:
        """Name plus the settings that differ from their defaults, fit for file names: ``ties_density0.1``."""
        parts = [self.name or type(self).__name__.lower()]
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            if _plain(value) != _plain(parameter.default):
                parts.append(f"{name}-{value.label}" if isinstance(value, Configured) else f"{name}{_plain(value)}")
        return re.sub(r"[^A-Za-z0-9._+-]+", "-", "_".join(parts)).strip("-")

    def __repr__(self) -> str:
        arguments = (f"{name}={getattr(self, name)!r}" for name in inspect.signature(type(self)).parameters)
        return f"{type(self).__name__}({', '.join(arguments)})"


def _plain(value: Any) -> Any:
    if isinstance(value, Configured):
        return {"class_path": type(value).__name__, "init_args": value.settings()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
