"""The table that compares all models after the latest task, for terminals and for log files."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from clmerge.names import shorten
from clmerge.results.confusion import ModelRow
from clmerge.results.contract import DATA_FREE
from clmerge.results.results import Results, Setting, is_reference

_NAME_LENGTH = 60
_FIGURES = ("average", "forget", "BWT")
_HINTS = {
    "task_agnostic": "task-agnostic: all classes compete",
    "task_aware": "task-aware: only the task's own classes compete",
}


class _Cells(NamedTuple):
    title: str
    notes: list[str]
    headings: list[str]
    rows: list[list[str]]
    models: list[str]
    best: str | None


def render_table(results: Results, *, setting: Setting | None = None, width: int = 80) -> Table:
    """Return a rich table with one row per model: accuracy on each task, average accuracy, forgetting, BWT.

    Percentages after the latest finished task. The best merger, by average accuracy, is bold and starred.
    Every task has a column if the table fits the width; otherwise only the first, the latest and the worst task. What
    the models looked at beside the training of each task is the last column, where one did.

    Args:
        results: Results of the run so far, at least one finished task.
        setting: Which reading of the logits to show; default the results' own.
        width: Columns of the terminal.

    Returns:
        A table to print with ``rich.console.Console``.

    Raises:
        ValueError: If no task is finished.
    """
    cells = _cells(results, setting or results.evaluation, width)
    table = Table(
        title=Text(cells.title),
        caption=Text("\n".join(cells.notes)),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, heading in enumerate(cells.headings):
        table.add_column(Text(heading), justify="left" if index == 0 else "right", no_wrap=True)
    for model, row in zip(cells.models, cells.rows, strict=True):
        style = "bold" if model == cells.best else "dim" if is_reference(model) else ""
        table.add_row(*(Text(cell) for cell in row), style=style)
    return table


def render_text(results: Results, *, setting: Setting | None = None, width: int = 80) -> str:
    """Return the table of :func:`render_table` as plain ASCII text, for log files and pipes.

    Args:
        results: Results of the run so far, at least one finished task.
        setting: Which reading of the logits to show; default the results' own.
        width: Largest length of a line.

    Returns:
        Lines joined by newlines, without a final newline.

    Raises:
        ValueError: If no task is finished.

    Example:
        >>> results = Results(["a", "b"], classes=[["0", "1"], ["2", "3"]])
        >>> results.add_row("ties", [1.0, 0.25], [1.0, 0.5])
        >>> results.add_row("ties", [0.75, 0.75], [1.0, 1.0])
        >>> print(render_text(results))
        Accuracy in % after task 2 of 2, task-agnostic
        model      a     b  average  forget    BWT
        ties *  75.0  75.0     75.0    25.0  -25.0
        task-agnostic: all classes compete
        * best merger by average accuracy
    """
    cells = _cells(results, setting or results.evaluation, width)
    body = align([cells.headings, *cells.rows])
    notes = [line for note in cells.notes for line in textwrap.wrap(note, width)]
    return "\n".join([cells.title, *body, *notes])


def final_text(results: Results, rows: Mapping[str, ModelRow], *, split: str) -> str:
    """Return a table of the accuracies of finished models on every task, as plain text.

    What the models looked at beside the training of each task is the last column, where one did.

    Args:
        results: Names of the tasks, their numbers of images, and which reading of the logits to show.
        rows: Name -> ``task_agnostic`` and ``task_aware``, one accuracy per task.
        split: Which images, for the title.
    """
    setting = results.evaluation
    names = results.task_labels(numbered=False)
    short = all(len(name) <= 6 for name in names)
    headings = names if short else [f"T{task + 1}" for task in range(len(names))]
    last, told = _data_column(results, list(rows))
    lines = [["model", *headings, "average", *last]]
    for (model, row), own in zip(rows.items(), told, strict=True):
        values = list(row[setting])
        lines.append([shorten(model, _NAME_LENGTH), *map(percent, values), percent(sum(values) / len(values)), *own])
    counts = f", {sum(results.samples or ())} images"
    notes = (
        [_HINTS[setting]]
        if short
        else [
            _HINTS[setting],
            ", ".join(f"{heading} {name}" for heading, name in zip(headings, names, strict=True)),
        ]
    )
    if needy := [model for model in rows if model in results.mergers and results.model(model).needs_task]:
        notes.append(told_note(needy))
    title = f"Accuracy in % on {split} images, {setting.replace('_', '-')}{counts}"
    return "\n".join([title, *align(lines), *notes])


def told_note(names: Sequence[str]) -> str:
    """Return a note on models that have task-aware accuracies alone."""
    return f"{', '.join(names)}: must be told the task of every image, so task-aware only"


def align(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as aligned lines: the first column to the left, the others to the right.

    Example:
        >>> align([["model", "A"], ["ties", "75.0"]])
        ['model     A', 'ties   75.0']
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(size) if i == 0 else cell.rjust(size)
            for i, (cell, size) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _cells(results: Results, setting: Setting, width: int) -> _Cells:
    done = results.num_finished
    if not done:
        raise ValueError("expected results with at least one finished task, got none; add rows first")
    best = results.best_merger(setting)
    models = results.models
    names = [shorten(model, _NAME_LENGTH) + " *" * (model == best) for model in models]
    accuracies = [results.matrix(model, setting)[-1, :done].tolist() for model in models]
    figures = [_latest_figures(results, model, setting) for model in models]
    notes = [_HINTS[setting], *(["* best merger by average accuracy"] if best else [])]

    if needy := [model for model in results.mergers if results.model(model).needs_task]:
        notes.append(told_note(needy))

    tasks = results.task_labels(numbered=False)[:done]
    short = all(len(name) <= 6 for name in tasks)
    headings = tasks if short else [f"T{task + 1}" for task in range(done)]
    last, told = _data_column(results, models)
    rows = _rows(names, accuracies, figures, told)
    if _width([["model", *headings, *_FIGURES, *last], *rows]) > width:
        headings = ["first", "latest", "worst"]
        rows = _rows(names, [[row[0], row[-1], min(row, key=_nan_first)] for row in accuracies], figures, told)
        notes.append(f"first, latest and worst of the {done} tasks seen so far")
    elif not short:
        notes.append(", ".join(f"{h} {name}" for h, name in zip(headings, tasks, strict=True)))
    title = f"Accuracy in % after task {done} of {results.num_tasks}, {setting.replace('_', '-')}"
    return _Cells(title, notes, ["model", *headings, *_FIGURES, *last], rows, models, best)


def _data_column(results: Results, models: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return heading and cell of every model of what they looked at; nothing where none looked at anything."""
    if all(is_reference(model) or results.model(model).data == DATA_FREE for model in models):
        return [], [[] for _ in models]
    return ["data"], [["-" if is_reference(model) else results.model(model).data] for model in models]


def _latest_figures(results: Results, model: str, setting: Setting) -> list[float]:
    figures = results.figures(model, setting)
    return [figures["average_accuracy"][-1], figures["forgetting"], figures["backward_transfer"]]


def _rows(
    names: list[str], accuracies: list[list[float]], figures: list[list[float]], told: list[list[str]]
) -> list[list[str]]:
    return [
        [name, *map(percent, accuracy), *map(percent, numbers), *last]
        for name, accuracy, numbers, last in zip(names, accuracies, figures, told, strict=True)
    ]


def _width(lines: list[list[str]]) -> int:
    """Return the length of a line with two spaces between columns."""
    return sum(max(map(len, column)) + 2 for column in zip(*lines, strict=True)) - 2


def _nan_first(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def percent(value: float) -> str:
    """Return a fraction in percent with one digit, ``-`` for NaN.

    Example:
        >>> percent(0.1234), percent(float("nan"))
        ('12.3', '-')
    """
    if math.isnan(value):
        return "-"
    text = f"{100 * value:.1f}"
    return "0.0" if text == "-0.0" else text
