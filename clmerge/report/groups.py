"""Group runs that are repetitions of each other, and name every group by the settings that tell it apart."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

# Settings in which repetitions of a run may differ.
_FREE = {"name", "seed", "run_dir", "resume", "config", "logging", "mergers"}


def group_labels(configs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Name the group of every run by the settings in which groups differ; seeds and names are ignored.

    Args:
        configs: Configurations of runs, as plain values; a run without one is a group of its own.
        names: Names of the runs: labels of groups that differ in more than two settings.

    Returns:
        One label per run, empty if there is one group.

    Example:
        >>> group_labels([{"seed": 0, "learner": {"x": 1}}, {"seed": 1, "learner": {"x": 1}}], ["a", "b"])
        ['', '']
        >>> group_labels([{"learner": {"x": 1}}, {"learner": {"x": 2}}], ["a", "b"])
        ['x=1', 'x=2']
    """
    nested = [_settled(config) for config in configs]
    groups: dict[str, list[int]] = {}
    for index, config in enumerate(nested):
        # Without a configuration it is unknown whether two runs are repetitions.
        key = json.dumps(config, default=str) if config else f"run {index}"
        groups.setdefault(key, []).append(index)
    if len(groups) == 1:
        return [""] * len(configs)
    settled = [_flat(config) for config in nested]
    first = [members[0] for members in groups.values()]
    differing = sorted(
        {key for i in first for key in settled[i] if any(settled[j].get(key) != settled[i][key] for j in first)}
    )
    labels = [""] * len(configs)
    for members in groups.values():
        config = settled[members[0]]
        parts = [f"{key[-1]}={config[key]}" for key in differing if key in config]
        label = ", ".join(parts) if parts and len(differing) <= 2 else names[members[0]]
        while label in labels:
            label += "'"
        for index in members:
            labels[index] = label
    return labels


def _settled(value: Any, depth: int = 0) -> Any:
    """Remove the settings in which repetitions may differ: the free settings at the top, and seeds everywhere."""
    if isinstance(value, Mapping):
        free = _FREE if depth == 0 else {"seed"}
        kept = {str(key): item for key, item in value.items() if key not in free}
        return {key: _settled(kept[key], depth + 1) for key in sorted(kept)}
    return [_settled(item, depth + 1) for item in value] if isinstance(value, list) else value


def _flat(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in _flat(item, (*path, key)).items()}
    return {path: value}
