"""The merge rules of a run: their settings and sources."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import clmerge.deploy.routing
from clmerge.checkpoints.ledger import configured_from
from clmerge.merging import Merger


@dataclass(frozen=True)
class Rule:
    """A merge rule with its settings.

    Attributes:
        merger: A merger of that rule; no task is ever folded into it.
        routing: Class of the routing around the merged model; empty if there is none.
        calibrated_by: The arXiv ids of the calibration of the merged model.
    """

    merger: Merger
    routing: str = ""
    calibrated_by: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """The rule's arguments as plain values."""
        return self.merger.settings()

    @property
    def sources(self) -> list[str]:
        """The arXiv ids of the rule and of its parts."""
        return list(dict.fromkeys([*_sources(self.merger), *_routing_sources(self.routing), *self.calibrated_by]))


def rule_of(setting: Mapping[str, Any]) -> Rule | None:
    """Return the rule of one model in ``results.json``, None if this version of clmerge lacks it.

    Only classes that are already imported are found; nothing that a file names is imported.
    """
    specification = {"class_path": setting["merger"], "init_args": setting.get("init_args")}
    try:
        routing = setting.get("routing") or {}
        papers = tuple((setting.get("calibration") or {}).get("sources", ()))
        return Rule(configured_from(plain(specification)), str(routing.get("class_path", "")), papers)
    except (ValueError, TypeError):
        return None


def plain(value: Any) -> Any:
    """Convert a part of a configuration to the form in a ledger: bare class names, arguments always present."""
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = value.get("init_args") or {}
        if not isinstance(arguments, Mapping):
            raise TypeError(f"expected the arguments of a class by name, got {arguments!r}")
        return {
            "class_path": str(value["class_path"]).rpartition(".")[2],
            "init_args": {key: plain(item) for key, item in arguments.items()},
        }
    return [plain(item) for item in value] if isinstance(value, list) else value


def _routing_sources(name: str) -> Iterable[str]:
    found: Any = getattr(clmerge.deploy.routing, name, None)
    if source := getattr(found, "source", ""):
        yield source


def _sources(value: Any) -> Iterable[str]:
    if source := getattr(value, "source", ""):
        yield source
    for argument in vars(value).values() if hasattr(value, "settings") else ():
        if hasattr(argument, "settings"):
            yield from _sources(argument)
