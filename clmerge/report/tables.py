"""The table that compares all models: for the page, for CSV, and in Markdown and LaTeX for papers."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from clmerge.figures.charts import numbers_of, to_csv
from clmerge.figures.numbers import MISSING, Unit, percent, show
from clmerge.names import visible
from clmerge.report.charts import value_of
from clmerge.report.figures import ranked
from clmerge.report.searches import order_spread
from clmerge.report.study import UNDEFINED, Entry, Spread, Study
from clmerge.results.contract import DATA_FREE
from clmerge.results.results import Setting
from clmerge.results.table import told_note

Format: TypeAlias = Literal["md", "latex"]
MOST_TASKS = 10  # largest number of tasks for which every task has a column


@dataclass(frozen=True)
class Column:
    """One column of numbers.

    Attributes:
        key: Name in CSV.
        title: Heading.
        hint: Description in one sentence.
        unit: Unit of its numbers.
        of: Returns the number of an entry.
        best: Which end is better, if any.
        in_papers: Whether the Markdown and LaTeX tables have this column.
    """

    key: str
    title: str
    hint: str
    unit: Unit
    of: Callable[[Entry], Spread]
    best: Literal["high", "low"] | None = "high"
    in_papers: bool = False


def columns(study: Study, setting: Setting) -> list[Column]:
    """Return the columns that the runs have numbers for."""

    def figure(key: str) -> Callable[[Entry], Spread]:
        return lambda entry: entry.figure(key, setting)

    found = [
        Column(
            "average_accuracy",
            "Average",
            "Mean accuracy on the tasks seen so far, after the last one.",
            "share",
            figure("average_accuracy"),
            in_papers=True,
        ),
        Column(
            "forgetting",
            "Forgetting",
            "Mean fall of a task from its best accuracy since it was learned; lower is better.",
            "share",
            figure("forgetting"),
            "low",
            in_papers=True,
        ),
        Column(
            "backward_transfer",
            "BWT",
            "Backward transfer: mean change of a task's accuracy since it was learned.",
            "share",
            figure("backward_transfer"),
            in_papers=True,
        ),
        Column(
            "average_incremental_accuracy",
            "Over time",
            "Average incremental accuracy: the mean of the average accuracy after every task.",
            "share",
            figure("average_incremental_accuracy"),
        ),
        Column(
            "gap_to_experts",
            "Gap",
            "How far the average is below the experts', each on its own task when just trained; lower is better.",
            "share",
            figure("gap_to_experts"),
            "low",
        ),
        Column(
            "normalised_accuracy",
            "Normalised",
            "Mean share of each expert's accuracy that is kept.",
            "share",
            figure("normalised_accuracy"),
        ),
        Column(
            "worst_task",
            "Worst task",
            "Lowest accuracy among the tasks seen so far, after the last one.",
            "share",
            figure("worst_task"),
        ),
        Column(
            "orders",
            "Orders",
            "Mean and standard deviation of the average over other orders of the tasks.",
            "share",
            lambda entry: order_spread(entry, setting),
        ),
        Column(
            "bytes_kept",
            "Kept",
            "Bytes the merger keeps from one task to the next.",
            "bytes",
            lambda entry: _last(entry.bytes_kept()),
            "low",
        ),
        Column(
            "merge_seconds",
            "Merging",
            "Time of the last merge, on the machine that did it.",
            "seconds",
            lambda entry: _last(entry.merge_seconds()),
            "low",
        ),
        *(_task_column(study, setting, task) for task in range(study.num_finished) if study.num_finished <= MOST_TASKS),
    ]
    return [column for column in found if any(column.of(entry).is_defined for entry in study.entries)]


def best_of(column: Column, entries: Iterable[Entry]) -> float:
    """Return the best number among the mergers, NaN if neither end of the column is better."""
    known = [column.of(entry).mean for entry in entries if entry.is_merger and column.of(entry).is_defined]
    if column.best is None or len(known) < 2:
        return math.nan
    return max(known) if column.best == "high" else min(known)


def table_csv(study: Study, setting: Setting) -> str:
    """Return all numbers of the table with full precision."""
    heading = ["model"]
    wanted = columns(study, setting)
    for column in wanted:
        heading += [column.key, f"{column.key}_std"]
    rows = []
    for entry in ranked(study, setting):
        row = [entry.name]
        for column in wanted:
            row += numbers_of(value_of(column.of(entry)))[:2]
        rows.append([*row, str(len(entry.runs)), entry.data if entry.is_merger else ""])
    return to_csv([*heading, "runs", "data"], rows)


def paper_table(study: Study, setting: Setting, form: Format) -> str:
    """Return the table as Markdown or LaTeX (with booktabs): accuracy per task, average, forgetting, BWT, in percent.

    What the models looked at beside the training of each task is the last column, where one did.

    Args:
        study: The runs.
        setting: Which reading of the logits.
        form: ``"md"`` or ``"latex"``.
    """
    every = columns(study, setting)
    wanted = [c for c in every if c.key.startswith("task_")] + [c for c in every if c.in_papers]
    entries = ranked(study, setting)
    best = {column.key: best_of(column, entries) for column in wanted}
    cells = [
        [
            _paper_cell(column.of(entry), form, bold=entry.is_merger and _shown_best(column, entry, best))
            for column in wanted
        ]
        for entry in entries
    ]
    names = [entry.name for entry in entries]
    needy = [entry.name for entry in entries if entry.needs_task]
    told = f" {told_note(needy)}." if needy else ""
    caption = (
        f"Accuracy in % after task {study.num_finished} of {len(study.tasks)}, {setting.replace('_', '-')}, "
        f"{_runs(entries)}.{' Bold: best merger.' if study.ranking(setting) else ''}{_names_of(wanted, study)}{told}"
    )
    titles = [column.title for column in wanted]
    if any(entry.data != DATA_FREE for entry in entries if entry.is_merger):
        titles.append("data")
        escape = escape_markdown if form == "md" else escape_latex
        data = [escape(entry.data) if entry.is_merger else MISSING for entry in entries]
        cells = [[*row, own] for row, own in zip(cells, data, strict=True)]
    if form == "md":
        return _markdown(caption, names, titles, cells)
    return _latex(caption, names, titles, cells, entries)


def escape_latex(text: str) -> str:
    r"""Escape LaTeX's special characters in text.

    Example:
        >>> print(escape_latex("ties_density0.1 & 50%"))
        ties\_density0.1 \& 50\%
    """
    special = {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        # After the end of a row, a bracket would begin its optional argument.
        "[": "{[}",
        "*": "{*}",
    }
    return "".join(special.get(character, character) for character in visible(text))


def escape_markdown(text: str) -> str:
    r"""Escape Markdown's special characters in text, including those of GitHub's tables.

    An underscore inside a word is not special and stays unchanged.

    Example:
        >>> print(escape_markdown("ties_density0.1"), escape_markdown("a|b *c* $x^2$ _d_"))
        ties_density0.1 a\|b \*c\* \$x^2\$ \_d\_
    """
    return re.sub(r"([\\`*\[\]<>|~$&!#]|(?<!\w)_|_(?!\w))", r"\\\1", visible(text))


def _task_column(study: Study, setting: Setting, task: int) -> Column:
    name = study.numbered[task]
    short = name if len(name) <= 6 else f"T{task + 1}"
    return Column(
        f"task_{task + 1}",
        short,
        f"Accuracy on task {task + 1} ({name}) after the last task.",
        "share",
        lambda entry: entry.last_row(setting)[task],
    )


def _markdown(caption: str, names: Sequence[str], titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [
        ["model", *(escape_markdown(title) for title in titles)],
        *([escape_markdown(name), *row] for name, row in zip(names, cells, strict=True)),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    rows = [
        " | ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return (
        "\n".join([f"| {rows[0]} |", f"|{rule}|", *(f"| {row} |" for row in rows[1:]), "", escape_markdown(caption)])
        + "\n"
    )


def _latex(
    caption: str,
    names: Sequence[str],
    titles: Sequence[str],
    cells: Sequence[Sequence[str]],
    entries: Sequence[Entry],
) -> str:
    heading = " & ".join(["Model", *(escape_latex(title) for title in titles)])
    rows = []
    for index, (name, row) in enumerate(zip(names, cells, strict=True)):
        if index and entries[index - 1].is_merger and not entries[index].is_merger:
            rows.append(r"\midrule")
        rows.append(" & ".join([escape_latex(name), *row]) + r" \\")
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"\centering",
            rf"\caption{{{escape_latex(caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * len(titles)}}}",
            r"\toprule",
            heading + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _paper_cell(spread: Spread, form: Format, *, bold: bool) -> str:
    text = percent(spread.mean)
    if text == MISSING:
        return "--" if form == "latex" else MISSING
    deviation = "" if math.isnan(spread.std) else percent(spread.std)
    if form == "md":
        text = f"**{text}**" if bold else text
        return f"{text} ± {deviation}" if deviation else text
    text = text.replace("-", "$-$")
    text = rf"\textbf{{{text}}}" if bold else text
    return rf"{text} {{\small$\pm$ {deviation}}}" if deviation else text


def _shown_best(column: Column, entry: Entry, best: dict[str, float]) -> bool:
    """Return whether a number equals the best one in the shown digits."""
    value, top = column.of(entry).mean, best[column.key]
    return not math.isnan(value) and not math.isnan(top) and show(value, column.unit) == show(top, column.unit)


def _runs(entries: Sequence[Entry]) -> str:
    counts = sorted({len(entry.runs) for entry in entries})
    if counts == [1]:
        return "one run"
    span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"mean ± standard deviation of {span} runs"


def _names_of(wanted: Sequence[Column], study: Study) -> str:
    """List the names of tasks that are too long for a heading."""
    named = [c.title for c in wanted if c.key.startswith("task_")]
    pairs = [f"{title} {name}" for title, name in zip(named, study.numbered, strict=False) if title != name]
    return f" {', '.join(pairs)}." if pairs else ""


def _last(spreads: Sequence[Spread]) -> Spread:
    return spreads[-1] if spreads else UNDEFINED


__all__ = ["Column", "Format", "best_of", "columns", "escape_latex", "escape_markdown", "paper_table", "table_csv"]
