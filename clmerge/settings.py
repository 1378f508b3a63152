"""Base class that derives settings, label and repr from the constructor's arguments."""

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar


class Configured:
    """Base of mergers, sparsifiers and finishers; subclasses store every constructor argument under its own name.

    ``settings()``, ``label`` and ``repr`` are derived from these attributes.

    Attributes:
        per_task: Constructor arguments that, where they are a list, have one entry per task index.
    """

    name: str = ""
    per_task: ClassVar[tuple[str, ...]] = ()

    def _own_parts(self) -> "Iterator[Configured]":
        """Yield the rules and parts among the constructor arguments."""
        for argument in inspect.signature(type(self)).parameters:
            value = getattr(self, argument)
            yield from (item for item in (value if isinstance(value, list | tuple) else [value]) if _is_part(item))

    def check_tasks(self, num_tasks: int, *, exact: bool = False) -> None:
        """Refuse a per-task setting, of this object or of a part, that lacks an entry for a task.

        Call it before training: without it, the error comes only when the task without an entry is merged.

        Args:
            num_tasks: How many tasks there will be.
            exact: Whether there will be no more, so that further entries would have no effect.

        Raises:
            ValueError: If there are more tasks than entries, or with ``exact`` fewer.
        """
        for argument in self.per_task:
            value = getattr(self, argument)
            if isinstance(value, list | tuple) and (len(value) < num_tasks or (exact and len(value) > num_tasks)):
                raise ValueError(
                    f"expected one entry for each of the {num_tasks} tasks in {argument} of {type(self).__name__}, got "
                    f"{len(value)}: {list(value)}; give {num_tasks}"
                )
        for part in self._own_parts():
            part.check_tasks(num_tasks, exact=exact)

    def check_names(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a pattern, of this object or of a part, that matches no parameter; call it before training.

        Args:
            shapes: Shapes of the parameters that will be merged, by name.

        Raises:
            ValueError: If a setting does not fit these names.
        """
        for part in self._own_parts():
            part.check_names(shapes)

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments as plain values.

        Returns:
            Numbers, strings, lists and None by argument name; an argument that is itself a rule or a part
            is given as ``{"class_path": ..., "init_args": {...}}``.
        """
        return {name: _plain(getattr(self, name)) for name in inspect.signature(type(self)).parameters}

    @property
    def label(self) -> str:
        """Name and the settings that differ from their defaults, valid as a file name: ``ties_density0.1``."""
        parts = [self.name or type(self).__name__.lower()]
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            if _plain(value) != _plain(parameter.default):
                parts.append(f"{name}-{value.label}" if isinstance(value, Configured) else f"{name}{_plain(value)}")
        return re.sub(r"[^A-Za-z0-9._+-]+", "-", "_".join(parts)).strip("-")

    def __repr__(self) -> str:
        arguments = (f"{name}={getattr(self, name)!r}" for name in inspect.signature(type(self)).parameters)
        return f"{type(self).__name__}({', '.join(arguments)})"


def _is_part(value: Any) -> bool:
    return isinstance(value, Configured)


def _plain(value: Any) -> Any:
    if isinstance(value, Configured):
        return {"class_path": type(value).__name__, "init_args": value.settings()}
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
