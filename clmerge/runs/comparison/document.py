"""The document of a comparison: results in the contract of ``results.json``, and the key ``compare`` beside it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from clmerge.runs.comparison.compare import Comparison
from clmerge.results.metrics.continual import Array
from clmerge.results.results import EXPERT, SETTINGS, Results, Setting

SCHEMA = 1
_AGGREGATED = ("average_accuracy", "average_incremental_accuracy", "forgetting", "backward_transfer")
_OWN = ("worst_task", "gap_to_experts", "normalised_accuracy")


def build_document(found: Sequence[Comparison], *, orders_seed: int = 0) -> dict[str, Any]:
    """Combine the comparisons of one or several runs into one document.

    Args:
        found: The comparisons, one per run; all streams have equally many tasks.
        orders_seed: Seed of the order sweeps.

    Raises:
        ValueError: If the runs have different numbers of tasks.
    """
    results = join_results(found)
    renamed = [{name: _name(name, one, len(found)) for name in one.results.models} for one in found]
    groups = group_names([one.run.config for one in found])
    orders = {new[name]: part for one, new in zip(found, renamed, strict=True) for name, part in one.orders.items()}
    searches = [
        {**part, "model": new[part["model"]]} for one, new in zip(found, renamed, strict=True) for part in one.searches
    ]
    before = [sum(len(one.searches) for one in found[:i]) for i in range(len(found))]
    settings = {
        new[name]: {**part, "search": None if part["search"] is None else part["search"] + offset}
        for one, new, offset in zip(found, renamed, before, strict=True)
        for name, part in one.settings.items()
    }
    figures = {
        model: {setting: own_figures(results, model, setting) for setting in SETTINGS} for model in results.models
    }
    return {
        **results.to_dict(),
        "compare": {
            "schema": SCHEMA,
            "runs": [_describe(one, group) for one, group in zip(found, groups, strict=True)],
            "settings": settings,
            "bytes_kept": {
                new[n]: v for one, new in zip(found, renamed, strict=True) for n, v in one.bytes_kept.items()
            },
            "merge_seconds": {
                new[n]: v for one, new in zip(found, renamed, strict=True) for n, v in one.merge_seconds.items()
            },
            "figures": _no_nan(figures),
            "searches": _no_nan(searches),
            "orders": {"seed": orders_seed, "models": _no_nan(orders)} if orders else None,
            "aggregates": _no_nan(_aggregates(results, figures, renamed, groups)) if len(found) > 1 else [],
            "diagnostics": next((one.diagnostics for one in found if one.diagnostics), None),
        },
    }


def check_alike(results: Mapping[str, Results]) -> None:
    """Refuse runs that cannot be compared with each other.

    Args:
        results: Results by the name of their run.

    Raises:
        ValueError: If they have different numbers of tasks, or different default readings of the logits.
    """
    if len({one.num_tasks for one in results.values()}) > 1:
        lengths = ", ".join(f"{name}: {one.num_tasks}" for name, one in results.items())
        raise ValueError(f"expected runs of as many tasks to compare, got {lengths}")
    if len({one.evaluation for one in results.values()}) > 1:
        read = ", ".join(f"{name}: {one.evaluation}" for name, one in results.items())
        raise ValueError(f"expected runs that go by the same accuracy, got {read}; choose one with --evaluation")


def join_results(found: Sequence[Comparison]) -> Results:
    """Return the results of one run, or those of several with every model named ``MODEL@RUN``.

    Args:
        found: The comparisons, one per run.

    Raises:
        ValueError: If the runs have different numbers of tasks.
    """
    first = found[0].results
    if len(found) == 1:
        return first
    check_alike({one.run.name: one.results for one in found})
    if all(one.results.tasks == first.tasks for one in found):
        joined = Results(first.tasks, classes=first.classes, samples=first.samples, evaluation=first.evaluation)
    else:  # other orders of classes: compare the t-th task of each run
        names = [f"task {t + 1}" for t in range(first.num_tasks)]
        joined = Results(names, classes=[[]] * first.num_tasks, evaluation=first.evaluation)
    for one in found:
        for model in one.results.models:
            for rows in zip(*(one.results.matrix(model, setting) for setting in SETTINGS), strict=True):
                joined.add_row(_name(model, one, len(found)), *rows)
    return joined


def own_figures(results: Results, model: str, setting: Setting) -> dict[str, list[float]]:
    """Return the figures of a model after every task that are not in the contract of ``results.json``.

    Args:
        results: The results.
        model: One of its models.
        setting: Which reading of the logits.

    Returns:
        ``worst_task``, ``gap_to_experts`` and ``normalised_accuracy``, one number per task each.
    """
    matrix = results.matrix(model, setting)
    run = model.removeprefix(model.partition("@")[0])
    experts = results.matrix(EXPERT + run, setting).diagonal()
    return {
        "worst_task": [float(matrix[t, : t + 1].min()) for t in range(len(matrix))],
        "gap_to_experts": [float((experts[: t + 1] - matrix[t, : t + 1]).mean()) for t in range(len(matrix))],
        "normalised_accuracy": [_ratio(matrix[t, : t + 1], experts[: t + 1]) for t in range(len(matrix))],
    }


def _ratio(accuracies: Array, experts: Array) -> float:
    return float((accuracies / experts).mean()) if experts.all() else math.nan


def group_names(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the group of every run after the options in which groups differ; seeds and names are ignored.

    Args:
        configs: Configurations of runs, as plain values.

    Returns:
        One name per run, empty if there is one group.

    Example:
        >>> group_names([{"seed": 0, "learner": {"x": 1}}, {"seed": 1, "learner": {"x": 1}}])
        ['', '']
        >>> group_names([{"learner": {"x": 1}}, {"learner": {"x": 2}}])
        ['learner.x=1', 'learner.x=2']
    """
    flat = [dict(_flatten(config)) for config in configs]
    ignored = ("name", "seed", "run_dir", "resume", "config", "mergers", "logging")
    keys = [
        key
        for key in dict.fromkeys(key for config in flat for key in config)
        if key.split(".")[0] not in ignored
        and not key.endswith(".seed")
        and any(config.get(key) != flat[0].get(key) for config in flat)
    ]
    return [" ".join(f"{key}={config.get(key)}" for key in keys) for config in flat]


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [
            pair for key, item in value.items() for pair in _flatten(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, value)]


def _describe(one: Comparison, group: str) -> dict[str, Any]:
    run = one.run
    return {
        "name": run.name,
        "path": str(run.folder.path),
        "group": group,
        "seed": run.config["seed"],
        "start_policy": run.config["learner"]["start_policy"],
        "tasks": [task.name for task in run.tasks],
        "num_parameters": run.num_parameters,
        "bank_bytes": sum(run.bank.path(task).stat().st_size for task in run.bank.tasks),
    }


def _aggregates(
    results: Results,
    figures: Mapping[str, Mapping[Setting, Mapping[str, list[float]]]],
    renamed: Sequence[Mapping[str, str]],
    groups: Sequence[str],
) -> list[dict[str, Any]]:
    """Return mean and standard deviation over the runs of a group, for every model that all of them have."""
    found = []
    for group in dict.fromkeys(groups):
        members = [names for names, other in zip(renamed, groups, strict=True) if other == group]
        for model in members[0]:
            if not all(model in names for names in members):
                continue
            models = [names[model] for names in members]
            entry: dict[str, Any] = {"model": model, "group": group, "models": models, "num_runs": len(models)}
            for setting in SETTINGS:
                contract = [results.figures(name, setting) for name in models]
                values: dict[str, list[Any]] = {key: [one[key] for one in contract] for key in _AGGREGATED}  # type: ignore[literal-required]
                values |= {key: [figures[name][setting][key] for name in models] for key in _OWN}
                entry[setting] = {key: _mean_and_std(several) for key, several in values.items()}
            found.append(entry)
    return found


def _mean_and_std(values: Sequence[Any]) -> dict[str, Any]:
    if isinstance(values[0], list):
        columns = [_mean_and_std(column) for column in zip(*values, strict=True)]
        return {key: [column[key] for column in columns] for key in ("mean", "std")}
    if any(math.isnan(value) for value in values):
        return {"mean": math.nan, "std": math.nan}
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else math.nan}


def _name(model: str, one: Comparison, num_runs: int) -> str:
    return model if num_runs == 1 else f"{model}@{one.run.name}"


def _no_nan(value: Any) -> Any:
    """Replace NaN, at any depth, by None."""
    if isinstance(value, Mapping):
        return {key: _no_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_no_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
