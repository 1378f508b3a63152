"""Join several folders about the same run into one run, and name models with different settings differently."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clmerge.report.runs import Run
from clmerge.results.results import is_reference

TUNED = "tuned"


def join_looks(looks: Sequence[Run]) -> list[Run]:
    """Join folders about the same run into one run; names and numbers do not depend on the order of the folders.

    Different mergers with the same name are renamed: ``NAME (tuned)`` if ``clmerge compare`` searched the settings and
    there is also one with given settings, ``NAME (density=0.2)`` if given settings differ. Mergers that differ only in
    seeds count as the same. If two folders have the same model, the run's own folder is used.

    Args:
        looks: Runs as :func:`clmerge.report.runs.read_runs` returns them.

    Returns:
        One run per run folder, in the order of first appearance.
    """
    joined: dict[Path, Run] = {run.path: run for run in reversed(looks)}
    found: dict[Path, Run] = {}
    for look in sorted(_told_apart(looks), key=lambda look: (look.is_comparison, [str(file) for file in look.files])):
        found[look.path] = found[look.path].joined(look) if look.path in found else look
    return [found[path] for path in reversed(joined)]


def _told_apart(looks: Sequence[Run]) -> list[Run]:
    variants: dict[str, dict[str, Mapping[str, Any]]] = {}  # settings by their text, by model
    plain = {model for look in looks for model in look.models if model not in look.tuned}
    for look in looks:
        for model, rule in look.rules.items():
            if model not in look.tuned:
                variants.setdefault(model, {})[_key(rule.settings)] = rule.settings
    renamed = []
    for look in looks:
        names = {}
        for model in look.models:
            if is_reference(model):
                continue
            several = variants.get(model, {})
            if model in look.tuned and model in plain:
                names[model] = f"{model} ({TUNED})"
            elif model not in look.tuned and model in look.rules and len(several) > 1:
                names[model] = f"{model} ({_differences(look.rules[model].settings, list(several.values()))})"
        renamed.append(look.renamed(names))
    return renamed


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(_without_seeds(settings), sort_keys=True, default=str)


def _differences(settings: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    differing = [key for key in settings if key != "seed" and any(_differ(settings, other, key) for other in others)]
    return ", ".join(f"{key}={settings[key]}" for key in differing)


def _differ(settings: Mapping[str, Any], other: Mapping[str, Any], key: str) -> bool:
    return _key({key: settings[key]}) != _key({key: other.get(key)})


def _without_seeds(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_seeds(item) for key, item in value.items() if key != "seed"}
    return value
