"""Which merge rules a run used: their settings, what they keep, where they come from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from clmerge.checkpoints.ledger import configured_from
from clmerge.deploy.naming import name_mergers
from clmerge.merging import Merger
from clmerge.merging.checks import Shapes


@dataclass(frozen=True)
class Rule:
    """A merge rule with its settings.

    Attributes:
        merger: An accumulator of that rule; nothing is ever folded in.
    """

    merger: Merger

    @property
    def settings(self) -> dict[str, Any]:
        """The rule's arguments as plain values."""
        return self.merger.settings()

    @property
    def sources(self) -> list[str]:
        """The arXiv ids of the rule and of the rules it is made of."""
        return list(dict.fromkeys(_sources(self.merger)))

    def bytes_kept(self, shapes: Shapes, num_tasks: int) -> int:
        """Return the size of the accumulators in bytes."""
        return self.merger.state_size(shapes, num_tasks)


def rule_of(setting: Mapping[str, Any]) -> Rule | None:
    """Return the rule of one model of ``clmerge compare``, None if this clmerge does not have it.

    Classes are looked up among those that are imported; nothing that a file names is imported.
    """
    specification = {"class_path": setting["merger"], "init_args": setting.get("init_args")}
    try:
        return Rule(configured_from(_plain(specification)))
    except (ValueError, TypeError):
        return None


def configured_rules(config: Mapping[str, Any]) -> dict[str, Rule]:
    """Return the rules of a run's configuration by the name they have in its results.

    A run with a rule from elsewhere gives nothing, since the names of the others may depend on it.
    """
    specifications = config.get("mergers")
    if not isinstance(specifications, list):
        return {}
    try:
        mergers = [configured_from(_plain(specification)) for specification in specifications]
    except (ValueError, TypeError):
        return {}
    return {name: Rule(merger) for name, merger in name_mergers(mergers).items()} if mergers else {}


def _plain(value: Any) -> Any:
    """Bring a part of a configuration into the form that a ledger has: bare class names, arguments always there."""
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = value.get("init_args") or {}
        if not isinstance(arguments, Mapping):
            raise TypeError(f"expected the arguments of a class by name, got {arguments!r}")
        return {
            "class_path": str(value["class_path"]).rpartition(".")[2],
            "init_args": {key: _plain(item) for key, item in arguments.items()},
        }
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _sources(value: Any) -> Iterable[str]:
    if source := getattr(value, "source", ""):
        yield source
    for argument in vars(value).values() if hasattr(value, "settings") else ():
        if hasattr(argument, "settings"):
            yield from _sources(argument)
