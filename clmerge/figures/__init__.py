"""Charts as data, and one way of drawing them: as Matplotlib figures, pictures, and SVG inside a page.

Figures are made through Matplotlib's object interface, so a program's own ``pyplot`` state, backend and open
figures stay unchanged. The pictures of a run show percent on a fixed range from 0 to 100, so that those of different
runs can be compared.
"""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from clmerge.figures.accuracy import (
    plot_average_accuracy,
    plot_final_accuracy,
    plot_forgetting_curves,
    plot_matrices,
    plot_matrix,
)
from clmerge.figures.confusion import confused, plot_confusion
from clmerge.figures.probes import plot_probe, probe_charts
from clmerge.names import file_name
from clmerge.results.results import EXPERT, SETTINGS, ZERO_SHOT, Results, Setting
from clmerge.weights import write_bytes_atomic

__all__ = [
    "plot_average_accuracy",
    "plot_confusion",
    "plot_files",
    "plot_final_accuracy",
    "plot_forgetting_curves",
    "plot_matrices",
    "plot_matrix",
    "plot_probe",
    "probe_charts",
    "save_plots",
    "to_png",
]

DPI = 130


def save_plots(results: Results, folder: str | Path) -> list[Path]:
    """Draw every picture of a run and write it as PNG, replacing each file atomically.

    The pictures are ``matrices.png`` (the best merger's matrix beside the expert's), ``forgetting_curves.png``,
    ``average_accuracy.png``, ``final_accuracy.png``, ``probe_NAME.png`` for every probe and, of a finished run,
    ``confusion.png``. Those in the folder itself show the run's default reading of the logits; those in its subfolder
    ``task_aware`` (or ``task_agnostic``) show the other one. The folder also gets the matrix of every model
    (``matrix_MODEL.png``) except the zero-shot one, whose rows are all the same.

    Args:
        results: Results of the run so far, at least one finished task.
        folder: Where to write; made if missing.

    Returns:
        The files written.

    Raises:
        ValueError: If no task is finished.
    """
    if not results.num_finished:
        raise ValueError("expected results with at least one finished task, got none; add rows first")
    # Draw all before writing the first, so that a folder never holds only some of them.
    drawn = {file: to_png(draw()) for file, draw in _plots(results, Path(folder)).items()}
    for file, data in drawn.items():
        write_bytes_atomic(file, data)
    return list(drawn)


def to_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def plot_files(results: Results, folder: str | Path) -> list[Path]:
    """Return the files that ``save_plots`` writes.

    Args:
        results: Results of the run.
        folder: Folder of the pictures.
    """
    return list(_plots(results, Path(folder)))


def _plots(results: Results, folder: Path) -> dict[Path, Callable[[], Figure]]:
    """Return what draws every picture, by its file."""
    moving = [model for model in results.models if model != ZERO_SHOT]
    plots: dict[Path, Callable[[], Figure]] = {}
    for model in moving:
        own: Setting = "task_aware" if results.model(model).needs_task else results.evaluation
        plots[folder / f"matrix_{file_name(model)}.png"] = partial(plot_matrix, results, model, setting=own)
    for probe in probe_charts(results):
        plots[folder / f"probe_{file_name(probe)}.png"] = partial(plot_probe, results, probe)
    for setting in SETTINGS:
        target = folder if setting == results.evaluation else folder / setting
        pair = [model for model in (results.best_merger(setting), EXPERT) if model in moving] or moving
        plots[target / "matrices.png"] = partial(plot_matrices, results, pair, setting=setting)
        if answered := confused(results, pair, setting):
            plots[target / "confusion.png"] = partial(plot_confusion, results, answered, setting=setting)
        plots[target / "forgetting_curves.png"] = partial(plot_forgetting_curves, results, setting=setting)
        plots[target / "average_accuracy.png"] = partial(plot_average_accuracy, results, setting=setting)
        plots[target / "final_accuracy.png"] = partial(plot_final_accuracy, results, setting=setting)
    return plots
