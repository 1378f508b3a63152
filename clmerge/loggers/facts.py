"""Describe a run for dashboards: name, group, tags, and the configuration under flat keys for filters."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_DEFAULT_NAME = "run"  # the default of --name in clmerge fit
_PLACES = ("config", "run_dir", "resume", "logging")  # where a run is stored is not a property of it
_TAG_LENGTH = 64  # W&B accepts no longer tags
_NAMED_MERGERS = 3
_EXPERIMENT = ("stream", "model", "mergers", "data", "learner", "trainer")  # parts that repetitions have in common
# Settings of these that say how a run is carried out, which may differ from machine to machine.
_MACHINE = {"data/num_workers", "data/cache_eval", "data/cache_mb"} | {
    f"trainer/{key}"
    for key in (
        "accelerator",
        "devices",
        "num_nodes",
        "strategy",
        "profiler",
        "enable_progress_bar",
        "log_every_n_steps",
    )
}


@dataclass(frozen=True)
class RunFacts:
    """Name, group, tags and settings of a run in dashboards.

    Attributes:
        name: Stream, method, tuning, start policy and seed.
        group: The name without the seed, and a digest of all settings in which repetitions of a run agree: it is shared
            by all seeds of an experiment, and by nothing else.
        tags: Scenario, tuning, start policy and mergers.
        settings: ``stream``, ``scenario``, ``num_tasks``, ``method``, ``tuning``, ``start_policy``, ``backbone`` and
            ``seed``, then the configuration, flat, by keys with slashes.
    """

    name: str
    group: str
    tags: list[str]
    settings: dict[str, Any]


def describe_run(config: Mapping[str, Any], *, stream: str, num_tasks: int, mergers: Sequence[str]) -> RunFacts:
    """Describe a run of ``clmerge fit``.

    Args:
        config: The configuration as plain dictionaries, as in ``config.yaml``.
        stream: Name of the stream.
        num_tasks: Number of its tasks.
        mergers: Names of the mergers; the first is the deployed one.

    Example:
        >>> config = {"name": "run", "seed": 3, "stream": {"class_path": "clmerge.streams.ClassIncremental"}}
        >>> facts = describe_run(config, stream="digits-5", num_tasks=5, mergers=["magmax", "ties"])
        >>> facts.name, facts.group, facts.settings["scenario"]
        ('digits-5 magmax+ties full s3', 'digits-5 magmax+ties full 11e7ff', 'ClassIncremental')
    """
    kept = {key: value for key, value in config.items() if key not in _PLACES}
    model, learner = kept.get("model") or {}, kept.get("learner") or {}
    scenario, tuning, start_policy = (
        class_name(kept.get("stream")),
        _tuning(model.get("tuning")),
        learner.get("start_policy"),
    )
    first = {
        "stream": stream,
        "scenario": scenario,
        "num_tasks": num_tasks,
        "method": "+".join(mergers),
        "tuning": tuning,
        "start_policy": start_policy,
        "backbone": _backbone(model.get("backbone")),
        "seed": kept.get("seed"),
    }
    named = kept.get("name") if kept.get("name") not in (None, _DEFAULT_NAME) else stream
    more = len(mergers) - _NAMED_MERGERS
    method = "+".join([*mergers[:_NAMED_MERGERS], *([f"{more} more"] if more > 0 else [])])
    group = " ".join(part for part in (named, method, tuning, start_policy) if part)
    tags = [scenario, tuning, start_policy, *mergers]
    return RunFacts(
        name=f"{group} s{first['seed']}",
        group=f"{group} {_digest(kept)}",
        tags=[tag[:_TAG_LENGTH] for tag in dict.fromkeys(tags) if tag],
        settings=first | {key: value for key, value in flatten(kept).items() if key not in first},
    )


def _digest(config: Mapping[str, Any]) -> str:
    """Return a short digest of the settings in which repetitions of a run agree: all but seeds, name and machine."""
    flat = flatten({key: config[key] for key in _EXPERIMENT if key in config})
    kept = {key: value for key, value in flat.items() if key.split("/")[-1] != "seed" and key not in _MACHINE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:6]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a nested configuration: one key per value, joined by slashes, and classes as their bare names.

    ``class_path`` and ``init_args`` are left out of the keys. An item of a list of classes has its class name in the
    key, and its place (1, 2, ...) if it has no name or shares it.

    Example:
        >>> flatten({"lr": 0.1, "source": {"class_path": "a.b.Npz", "init_args": {"path": "x.npz"}}})
        {'lr': 0.1, 'source': 'Npz', 'source/path': 'x.npz'}
        >>> flatten({"mergers": [{"class_path": "a.TIES", "init_args": {"density": 0.2}}, {"class_path": "a.DARE"}]})
        {'mergers': ['TIES', 'DARE'], 'mergers/TIES/density': 0.2}
    """
    below = f"{prefix}/" if prefix else ""
    if isinstance(config, Mapping) and "class_path" in config:
        return {prefix: class_name(config)} | flatten_items(config.get("init_args") or {}, below)
    if isinstance(config, Mapping):
        return flatten_items(config, below)
    if isinstance(config, list | tuple) and config and all(isinstance(item, Mapping) for item in config):
        names = [class_name(item) if "class_path" in item else None for item in config]
        flat: dict[str, Any] = {prefix: names} if any(names) else {}
        for position, (item, name) in enumerate(zip(config, names, strict=True), start=1):
            # Items of one class are distinguished by their place.
            label = name if name and names.count(name) == 1 else f"{name or ''} {position}".lstrip()
            flat |= flatten_items(item.get("init_args") or {} if name else item, f"{below}{label}/")
        return flat
    return {prefix: list(config) if isinstance(config, tuple) else config}


def flatten_items(items: Mapping[str, Any], below: str) -> dict[str, Any]:
    """Flatten every value of a dictionary under its key."""
    flat: dict[str, Any] = {}
    for key, value in items.items():
        flat |= flatten(value, f"{below}{key}")
    return flat


def class_name(config: Any) -> str | None:
    """Return the bare name of a configured class; None for anything else."""
    if isinstance(config, Mapping):
        config = config.get("class_path")
    return config.rsplit(".", 1)[-1] if isinstance(config, str) else None


def _tuning(config: Any) -> str:
    """Return the tuning mode in lower case, with its scope if that is a name; default ``full``."""
    name = (class_name(config) or "full").lower()
    arguments = config.get("init_args") if isinstance(config, Mapping) else None
    scope = (arguments or {}).get("scope")
    return f"{name}-{scope}" if isinstance(scope, str) else name


def _backbone(config: Any) -> str | None:
    """Return the architecture's name, or the class name if there is none."""
    arguments = config.get("init_args") if isinstance(config, Mapping) else None
    return (arguments or {}).get("name") or class_name(config)
