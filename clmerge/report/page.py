"""Render the page: one self-contained HTML file with its style, script, charts and numbers."""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from clmerge.figures.charts import HeatChart
from clmerge.figures.drawing import draw_key, draw_panels, draw_strip
from clmerge.figures.looks import css_gradient, css_variables
from clmerge.figures.numbers import percent, plural, show
from clmerge.names import visible
from clmerge.report.charts import Figure, look
from clmerge.report.citations import bibtex
from clmerge.report.classes import MOST_LISTED, ClassTable, class_tables, classes_csv
from clmerge.report.diagnostics import measured_on
from clmerge.report.figures import make_figures, ranked
from clmerge.report.fronts import fronts_of
from clmerge.report.ledger import merged_of, report_versions, sources_of
from clmerge.report.probes import probe_table
from clmerge.report.searches import chosen_of
from clmerge.report.soups import soups_of
from clmerge.report.study import REFERENCES, Entry, Study
from clmerge.report.tables import Column, best_of, columns, table_csv
from clmerge.report.verdict import Verdict, judge
from clmerge.results.results import Setting

_FOLDER = Path(__file__).parent / "page"
_RELOAD_SECONDS = 5
_HINTS: dict[Setting, str] = {
    "task_agnostic": "All classes compete: the model is not told which task an image belongs to.",
    "task_aware": "Only the classes of the image's own task compete: the model is told the task.",
}


@dataclass(frozen=True)
class Cell:
    """One number of the table: as shown, and with all digits."""

    column: Column
    text: str
    deviation: str
    exact: str
    is_best: bool


@dataclass(frozen=True)
class View:
    """The parts of the page that depend on how accuracy is measured."""

    setting: Setting
    hint: str
    verdict: Verdict
    columns: Sequence[Column]
    entries: Sequence[Entry]
    cells: Sequence[Sequence[Cell]]
    references: Mapping[str, str]
    figures: Sequence[Figure]
    table_csv: str
    classes: Sequence[ClassTable]
    classes_csv: str


def make_views(study: Study) -> list[View]:
    """Return one view for each way of measuring accuracy, that of the study first."""
    return [_view(study, setting) for setting in study.settings]


def render_page(
    study: Study,
    views: Sequence[View],
    common: Sequence[Figure],
    diagnostics: Sequence[Figure],
    *,
    title: str,
    folder: str,
    left: str | None = None,
) -> str:
    """Return the page as HTML.

    Args:
        study: The runs.
        views: The views that :func:`make_views` returned.
        common: Figures that do not depend on how accuracy is measured.
        diagnostics: Figures that explain the accuracies.
        title: Heading of the page.
        folder: Name of the folder beside the page with the figures as files.
        left: How long the runs will still take, if the page is written again while they go on.
    """
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=_legible,
    )
    environment.filters["data_uri"] = lambda text: f"data:text/csv;charset=utf-8,{quote(text)}"
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        title=title,
        subtitle=_subtitle(study),
        left=left,
        reload_seconds=_RELOAD_SECONDS,
        study=study,
        views=views,
        common=common,
        diagnostics=diagnostics,
        measured_on=measured_on(study),
        probes=probe_table(study),
        searches=chosen_of(study),
        fronts=fronts_of(study),
        soups=soups_of(study, study.evaluation),
        several_runs=len(study.runs) > 1,
        most_listed=MOST_LISTED,
        ledger=merged_of(study),
        sources=sources_of(study),
        versions=report_versions(),
        bibtex=bibtex(source for entry in study.mergers if entry.rule for source in entry.rule.sources),
        folder=folder,
        # Package files, which are the only text that is not escaped.
        style=Markup(css_variables() + (_FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        draw=draw_panels,
        key=draw_key,
        look=look,
        strip=draw_strip,
        ends=_ends,
        gradient=css_gradient(),
    )


def _view(study: Study, setting: Setting) -> View:
    wanted = columns(study, setting)
    entries = ranked(study, setting)
    best = [best_of(column, entries) for column in wanted]
    return View(
        setting,
        _HINTS[setting],
        judge(study, setting),
        wanted,
        entries,
        [[_cell(entry, column, top) for column, top in zip(wanted, best, strict=True)] for entry in entries],
        {entry.model: REFERENCES[entry.model] for entry in entries if not entry.is_merger},
        make_figures(study, setting),
        table_csv(study, setting),
        class_tables(study, setting),
        classes_csv(study, setting),
    )


def _cell(entry: Entry, column: Column, best: float) -> Cell:
    spread = column.of(entry)
    share = column.unit == "share"
    return Cell(
        column,
        percent(spread.mean) if share else show(spread.mean, column.unit),
        percent(spread.std) if share and not math.isnan(spread.std) else "",
        repr(spread.mean) if spread.is_defined else "",
        entry.is_merger and spread.mean == best,
    )


def _subtitle(study: Study) -> str:
    done, total = study.num_finished, len(study.tasks)
    tasks = plural(total, "task") if done == total else f"{done} of {plural(total, 'task')}"
    samples = f", {sum(study.samples)} {study.images}" if study.samples else ""
    return f"{plural(len(study.mergers), 'merger')} on {plural(len(study.runs), 'run')} over {tasks}{samples}."


def _ends(chart: HeatChart) -> list[str]:
    """Return the ends of a chart's colour scale as text."""
    return [percent(value, 0) + " %" if chart.unit == "share" else show(value, "number") for value in chart.value_range]


def _legible(value: object) -> object:
    """Return text with control characters and marks that change the direction of writing as escapes.

    Markup and values that are not text are returned unchanged.
    """
    return visible(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value
