"""Figures that explain the accuracies, from the document of ``clmerge.evaluation.diagnostics``."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from clmerge.figures.charts import Grid, HeatChart, Line, LineChart, Panel, Value
from clmerge.figures.numbers import Unit
from clmerge.report.charts import Figure, look
from clmerge.report.runs import number
from clmerge.report.study import EXPERT, Entry, Study

Rows = Sequence[Sequence[float | None]]


def diagnostic_figures(study: Study) -> list[Figure]:
    """Draw the diagnostics of the first run that has any."""
    found = study.diagnosed.results.diagnostics if study.diagnosed else None
    if not found:
        return []
    figures: list[Figure] = []
    if found.get("vectors"):
        figures += _vectors(found["vectors"], study.tasks)
    if found.get("models"):
        figures += _models(found["models"], study)
    if found.get("layers"):
        figures += _layers(found["layers"], study.tasks)
    return figures


def measured_on(study: Study) -> str:
    """Describe the images that the diagnostics were measured on; empty if none were needed."""
    found = ((study.diagnosed.results.diagnostics if study.diagnosed else None) or {}).get("models")
    if not found:
        return ""
    split = {"val": "validation ", "test": "test "}.get(found.get("split"), "")
    reading = str(found["setting"]).replace("_", "-")
    return f"What takes images was measured on {sum(found['images'])} {split}images, {reading}."


def _vectors(found: Mapping[str, Any], tasks: Sequence[str]) -> Iterable[Figure]:
    whole, layers, matrices = found["whole"], found["layers"], found["matrices"]
    yield Figure(
        "cosine",
        "Do the task vectors point the same way?",
        "Cosine between the weight changes of two tasks: near 0 they barely touch each other, near 1 they agree.",
        _by_tasks({"": whole["cosine"]}, tasks, "cosine", (min(0.0, _lowest(whole["cosine"])), 1.0)),
    )
    yield Figure(
        "sign_conflict",
        "Do they disagree in sign?",
        "Share of the weights changed by both tasks whose signs are opposite: 0.5 is no more agreement than by chance.",
        _by_tasks({"": whole["sign_conflict"]}, tasks, "sign conflict", (0.0, 1.0)),
    )
    if matrices:
        yield Figure(
            "subspace_overlap",
            "Do they use the same directions?",
            f"Overlap of the {found['rank']} leading directions of two tasks, mean over all matrices: 1 are the same "
            "directions, 0 orthogonal ones. Outputs are directions that are written to, inputs those read from.",
            _by_tasks(
                {
                    "outputs": _mean_matrix([matrix["left_overlap"] for matrix in matrices]),
                    "inputs": _mean_matrix([matrix["right_overlap"] for matrix in matrices]),
                },
                tasks,
                "overlap",
                (0.0, 1.0),
            ),
        )
    if layers:
        names = _short_names([layer["name"] for layer in layers])
        cosines = [_mean_of_others(layer["cosine"]) for layer in layers]
        yield Figure(
            "layers_cosine",
            "Where in the network do they agree?",
            "Mean cosine of each task's weight changes with the other tasks', layer by layer.",
            _by_layer(cosines, names, tasks, "mean cosine", (min(0.0, _lowest(cosines)), 1.0)),
        )
        norms = [layer["norm"] for layer in layers]
        yield Figure(
            "layers_norm",
            "How far did each layer move?",
            "Length of each task's weight changes, layer by layer.",
            _by_layer(norms, names, tasks, "norm", (0.0, _highest(norms))),
        )
    if layers and matrices:
        ranks = [_mean_rows([m["effective_rank"] for m in matrices if m["layer"] == layer["name"]]) for layer in layers]
        kept = [(name, row) for name, row in zip(names, ranks, strict=True) if row]
        yield Figure(
            "effective_rank",
            "How many directions does a task use?",
            "Effective rank of the weight changes, mean over the matrices of a layer.",
            _by_layer([r for _, r in kept], [n for n, _ in kept], tasks, "rank", (0.0, _highest([r for _, r in kept]))),
        )


def _layers(found: Mapping[str, Any], tasks: Sequence[str]) -> Iterable[Figure]:
    """Draw what averaging two experts does to each layer."""
    first, second = (tasks[task] for task in found["tasks"])
    layers = found["layers"]
    names = _short_names([layer["name"] for layer in layers])
    columns = {
        "barrier": f"of {first}",
        "barrier_of_second": f"of {second}",
    }
    barriers = [[layer[key] for key in columns] for layer in layers]
    span = (0.0, max(_highest(barriers), 1e-3))
    yield Figure(
        "layers_barrier",
        "Which layer cannot be averaged?",
        f"Rise of the loss when one layer goes from the expert of {first} to that of {second} and all others stay, "
        f"measured on {found['images']} images of both tasks: 0 is no barrier.",
        _by_layer(barriers, names, list(columns.values()), "barrier", span, across="other layers"),
    )
    known = [(name, layer) for name, layer in zip(names, layers, strict=True) if layer["llfc"] is not None]
    if known:
        rows = [[layer["llfc"], layer["features_apart"]] for _, layer in known]
        yield Figure(
            "layers_features",
            "Does averaging weights average features?",
            "One minus the cosine between the features of the averaged model and the average of both experts' "
            "features, beside that between the two experts' features: 0 is the same direction.",
            _by_layer(
                rows,
                [name for name, _ in known],
                ["average", "experts apart"],
                "1 - cosine",
                (0.0, max(_highest(rows), 1e-3)),
                across="features",
            ),
        )


def _models(found: Mapping[str, Any], study: Study) -> Iterable[Figure]:
    tasks = study.tasks
    panels = [
        Panel("From the base model to each expert", _curves(found, study, "base", EXPERT)),
        Panel("From each expert to the merged models", _curves(found, study, EXPERT, None)),
        Panel("Between two experts", _curves(found, study, EXPERT, EXPERT)),
    ]
    panels = [panel for panel in panels if panel.lines]
    if panels:
        yield Figure(
            "barriers",
            "Is there a hill between the models?",
            "Error of the models on the straight line between two models, mean over the tasks: a hill in the middle is "
            "a barrier, and averaging weights lands on it.",
            LineChart(panels, "share of the way", "error"),
        )
    if found.get("disentanglement"):
        xi = found["disentanglement"]["xi"]
        yield Figure(
            "disentanglement",
            "Do task vectors leave other tasks alone?",
            "Share of images whose prediction changes when the other task's vector is added, too: 0 is perfect.",
            _by_tasks({"": xi}, tasks, "share changed", (0.0, max(_highest(xi), 0.01)), unit="share"),
        )
    models = found["models"]
    pieces: tuple[tuple[str, str, str, Unit], ...] = (
        (
            "disagreement",
            "What did merging change?",
            "Share of each task's images that a model classifies unlike the task's expert, rightly or wrongly.",
            "share",
        ),
        (
            "representation_bias",
            "How far did the features move?",
            "Mean distance of a model's features from those of each task's expert.",
            "number",
        ),
    )
    for key, title, sentence, unit in pieces:
        names = [name for name in models if name != EXPERT]
        rows = [models[name][key] for name in names]
        if names:
            span = (0.0, max(_highest(rows), 1e-9))
            yield Figure(
                key, title, sentence, _by_layer(rows, names, tasks, key.replace("_", " "), span, "model", unit)
            )


def _curves(found: Mapping[str, Any], study: Study, start: str, end: str | None) -> list[Line]:
    """Return one line per model at the end of the segments, the mean over all of its segments."""
    by_end: dict[str, list[Sequence[float | None]]] = {}
    for segment in found["segments"]:
        if segment["from"] == start and (segment["to"] == end or (end is None and segment["to"] != EXPERT)):
            by_end.setdefault(segment["to"], []).append(segment["error"])
    lines = []
    for model, curves in by_end.items():
        entry = _entry(study, model)
        (values,) = _values([_mean_rows(curves)])
        lines.append(Line(entry.name, look(entry), list(zip(found["positions"], values, strict=True))))
    return lines


def _entry(study: Study, model: str) -> Entry:
    """Return the entry of a model in any group, or a new one for this chart."""
    return next((entry for entry in study.entries if entry.model == model), Entry(model, model, ()))


def _by_tasks(
    grids: Mapping[str, Rows], tasks: Sequence[str], name: str, span: tuple[float, float], unit: Unit = "number"
) -> HeatChart:
    labels = tasks[: len(next(iter(grids.values())))]
    cells = [Grid(title, _values(rows)) for title, rows in grids.items()]
    return HeatChart(cells, "task", "other task", labels, labels, name, span, unit, diagonal=False)


def _by_layer(
    rows: Rows,
    names: Sequence[str],
    tasks: Sequence[str],
    name: str,
    span: tuple[float, float],
    what: str = "layer",
    unit: Unit = "number",
    across: str = "task",
) -> HeatChart:
    return HeatChart(
        [Grid("", _values(rows))], what, across, names, tasks[: len(rows[0])], name, span, unit, diagonal=False
    )


def _values(rows: Rows) -> list[list[Value]]:
    return [[Value(number(value)) for value in row] for row in rows]


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the defined values: a matrix that a task did not change has no direction."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _mean_rows(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    return [_mean(values) for values in zip(*rows, strict=True)]


def _mean_matrix(matrices: Sequence[Rows]) -> list[list[float | None]]:
    return [_mean_rows(rows) for rows in zip(*matrices, strict=True)]


def _mean_of_others(matrix: Rows) -> list[float | None]:
    return [_mean(value for other, value in enumerate(row) if other != task) for task, row in enumerate(matrix)]


def _lowest(rows: Rows) -> float:
    return _end(min, rows)


def _highest(rows: Rows) -> float:
    return _end(max, rows)


def _end(choose: Callable[..., float], rows: Rows) -> float:
    known = [value for row in rows for value in row if value is not None and math.isfinite(value)]
    return float(choose(known, default=0.0))


def _short_names(names: Sequence[str]) -> list[str]:
    """Shorten dotted names to their last two parts if they stay different."""
    short = [".".join(name.split(".")[-2:]) for name in names]
    return short if len(set(short)) == len(names) else list(names)
