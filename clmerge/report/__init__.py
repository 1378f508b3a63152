"""Report the results of ``clmerge fit`` and ``clmerge compare`` as one page, with its figures also as files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clmerge.figures import to_png
from clmerge.figures.drawing import draw
from clmerge.report.charts import Figure
from clmerge.report.diagnostics import diagnostic_figures
from clmerge.report.figures import common_figures
from clmerge.report.page import make_views, render_page
from clmerge.report.runs import read_runs
from clmerge.report.study import Study, make_study
from clmerge.report.tables import paper_table
from clmerge.results.results import Setting
from clmerge.weights import write_bytes_atomic

__all__ = ["make_study", "paper_table", "read_study", "write_report"]


def read_study(folders: Sequence[str | Path], *, evaluation: Setting | None = None) -> Study:
    """Read run folders and combine them into one study.

    Args:
        folders: Folders of ``clmerge fit`` or ``clmerge compare`` over the same stream.
        evaluation: The reading of the logits to show first; default that of the first run.

    Raises:
        FileNotFoundError: If a folder does not exist or has no results.
        ValueError: If a file is damaged, or the runs do not match.
    """
    study = make_study([run for folder in folders for run in read_runs(folder)])
    return study if evaluation is None else replace(study, evaluation=evaluation)


def write_report(study: Study, out: str | Path, *, title: str | None = None, left: str | None = None) -> list[Path]:
    """Write the page, and its figures as PNG and CSV into a folder beside it; replace every file atomically.

    Args:
        study: The study that :func:`read_study` returned.
        out: The page, for example ``report.html``; the folder is then ``report_figures``. It holds the figures of the
            study's evaluation; those of the other one are in a subfolder of that name.
        title: Heading of the page. Default: the names of the runs.
        left: How long the runs will still take; the page then loads itself again every few seconds.

    Returns:
        The files written, the page last.
    """
    page = Path(out)
    folder = page.with_name(f"{page.stem}_figures")
    views = make_views(study)
    common, diagnostics = common_figures(study), diagnostic_figures(study)
    files = _draw_figures([*common, *diagnostics], folder)
    for view in views:
        target = folder if view.setting == study.evaluation else folder / view.setting
        files[target / "models.csv"] = view.table_csv.encode()
        if view.classes:
            files[target / "classes.csv"] = view.classes_csv.encode()
        files |= _draw_figures(view.figures, target)
    name = title or ", ".join(dict.fromkeys(run.name for run in study.runs))
    files[page] = render_page(study, views, common, diagnostics, title=name, folder=folder.name, left=left).encode()
    # Draw everything before writing anything, so that a failure leaves no partial report.
    for file, data in files.items():
        write_bytes_atomic(file, data)
    return list(files)


def _draw_figures(figures: Sequence[Figure], folder: Path) -> dict[Path, bytes]:
    files = {}
    for figure in figures:
        files[folder / f"{figure.name}.csv"] = figure.chart.to_csv().encode()
        files[folder / f"{figure.name}.png"] = to_png(draw(figure.chart))
    return files
