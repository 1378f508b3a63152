"""The names of metrics. W&B, TensorBoard and MLflow group metrics into sections by the part before a slash.

Names have exactly one slash, so that grouping by the first and by the last slash is the same::

    cl/task                            number of tasks learned so far, 1, 2, ...; the x-axis
    cl/average_accuracy                of the deployed model, to sort and compare runs; likewise the other figures. In
                                       the run's default reading of the logits, which ``cl/evaluation`` names
    cl_average_accuracy/MODEL          of every model (magmax ..., expert, zero_shot), side by side
    cl_data/MODEL                      in W&B's summary: the images that it looked at beside the training of each task
    cl_accuracy_MODEL/TASK             accuracy on one task: the forgetting curves of a model; long names of tasks are
                                       shortened, as in tables

    cl_probe_PROBE/MODEL               what a probe found about a model, such as cl_probe_attack_success/ties
    cl_probe_PROBE_MODEL/TASK          the same for one task

``cl_task_aware_...`` is the same in the task-aware reading; all other ``cl_`` names with a model are task-agnostic.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from clmerge.names import shown
from clmerge.results.results import Results, Setting

TASK_KEY: Final = "cl/task"
FIGURES: Final = (
    "average_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "average_incremental_accuracy",
    "learning_accuracy",
)
PREFIXES: Final[dict[str, Setting]] = {"cl": "task_agnostic", "cl_task_aware": "task_aware"}


def task_metrics(results: Results, deployed: str | None = None) -> dict[str, float]:
    """Return every defined figure after the latest task by its metric name.

    Args:
        results: Results of the run so far, at least one finished task.
        deployed: The run's deployed model. Default: the first merger, if there is any.

    Returns:
        Names to numbers; undefined figures are left out.

    Example:
        >>> results = Results(["a", "b"], classes=[["0"], ["1"]])
        >>> results.add_row("ties", [1.0, 0.25], [1.0, 0.5])
        >>> metrics = task_metrics(results)
        >>> metrics["cl/average_accuracy"], metrics["cl_task_aware_accuracy_ties/b"]
        (1.0, 0.5)
        >>> "cl_forgetting/ties" in metrics
        False
    """
    return figure_metrics(results, deployed) | by_task_metrics(results)


def figure_metrics(results: Results, deployed: str | None = None) -> dict[str, float]:
    """Return what of :func:`task_metrics` is one number for all tasks; arguments as there."""
    deployed = deployed_model(results, deployed)
    metrics: dict[str, float] = {}
    own = None if deployed is None else results.figures(deployed, results.evaluation)
    if own is not None:
        metrics |= {f"cl/{name}": _latest(own[name]) for name in FIGURES}
    for prefix, setting in PREFIXES.items():
        for model in results.models:
            figures = results.figures(model, setting)
            values = {name: _latest(figures[name]) for name in FIGURES}
            if model == deployed and prefix != "cl":
                metrics |= {f"{prefix}/{name}": value for name, value in values.items()}
            metrics |= {f"{prefix}_{name}/{part_of_key(model)}": value for name, value in values.items()}
    for model, probe, found in _probes(results):
        metrics[f"cl_probe_{probe}/{part_of_key(model)}"] = _number(found["value"])
    return _defined(metrics)


def by_task_metrics(results: Results) -> dict[str, float]:
    """Return what of :func:`task_metrics` is a number for every task; arguments as there."""
    tasks = [part_of_key(label) for label in results.task_labels()]
    metrics: dict[str, float] = {}
    for prefix, setting in PREFIXES.items():
        for model in results.models:
            row = results.matrix(model, setting)[-1].tolist()
            metrics |= {
                f"{prefix}_accuracy_{part_of_key(model)}/{task}": accuracy
                for task, accuracy in zip(tasks, row, strict=True)
            }
    for model, probe, found in _probes(results):
        per_task = zip(tasks, found.get("per_task", ()), strict=False)
        metrics |= {f"cl_probe_{probe}_{part_of_key(model)}/{task}": _number(value) for task, value in per_task}
    return _defined(metrics)


def _probes(results: Results) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield model, probe, and what it found about the model after the latest task."""
    for model in results.models:
        yield from ((model, probe, found) for probe, found in results.model(model).probes.items() if "value" in found)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _defined(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def part_of_key(name: str) -> str:
    """Return a name for use in a metric's name: safe to display, and without slashes, which would open a section.

    Example:
        >>> part_of_key("indoor/kitchen")
        'indoor_kitchen'
    """
    return shown(name).replace("/", "_")


def _latest(figure: float | list[float]) -> float:
    return figure[-1] if isinstance(figure, list) else figure


def deployed_model(results: Results, deployed: str | None = None) -> str | None:
    """Return the run's deployed model: ``deployed`` if given, else the first merger, else the un-merged model.

    Raises:
        ValueError: If the run has no model of that name.
    """
    if deployed is None:
        return next(iter([*results.mergers, *results.models]), None)
    if deployed not in results.models:
        raise ValueError(f"expected one of the models {results.models}, got {deployed!r}")
    return deployed
