"""Pictures of a run: accuracy matrices, forgetting curves, average accuracy, final accuracy.

Figures are made through Matplotlib's object interface, so a program's own ``pyplot`` state, backend and open
figures are left alone. All axes show percent on a fixed range from 0 to 100: pictures of different runs can
be laid side by side.
"""

from pathlib import Path

from matplotlib.figure import Figure

from clmerge.plots.curves import plot_average_accuracy, plot_final_accuracy, plot_forgetting_curves
from clmerge.plots.matrices import plot_matrices, plot_matrix
from clmerge.results import EXPERT, SETTINGS, ZERO_SHOT, Results
from clmerge.weights import atomic_path

__all__ = [
    "plot_average_accuracy",
    "plot_final_accuracy",
    "plot_forgetting_curves",
    "plot_matrices",
    "plot_matrix",
    "save_plots",
]

DPI = 130


def save_plots(results: Results, folder: str | Path) -> list[Path]:
    """Draw every picture of a run and write them as PNG, each file replaced atomically.

    ``matrices.png`` (the best merger's matrix beside the expert's), ``forgetting_curves.png``,
    ``average_accuracy.png`` and ``final_accuracy.png``: task-agnostic in the folder itself, task-aware in its
    ``task_aware``. The folder also gets the task-agnostic matrix of every model but the zero-shot one, whose
    rows are all the same (``matrix_MODEL.png``).

    Args:
        results: What the run found so far, at least one finished task.
        folder: Where to write; made if missing.

    Returns:
        The files written.

    Raises:
        ValueError: If no task is finished.
    """
    if not results.num_finished:
        raise ValueError("expected results with at least one finished task, got none; add rows first")
    moving = [model for model in results.models if model != ZERO_SHOT]
    files = _save({f"matrix_{model}": plot_matrix(results, model) for model in moving}, Path(folder))
    for setting in SETTINGS:
        best = results.best_merger(setting)
        pair = [model for model in (best, EXPERT) if model is not None and model in moving]
        figures = {
            "matrices": plot_matrices(results, pair or moving, setting=setting),
            "forgetting_curves": plot_forgetting_curves(results, setting=setting),
            "average_accuracy": plot_average_accuracy(results, setting=setting),
            "final_accuracy": plot_final_accuracy(results, setting=setting),
        }
        files += _save(figures, Path(folder) if setting == "task_agnostic" else Path(folder, setting))
    return files


def _save(figures: dict[str, Figure], folder: Path) -> list[Path]:
    files = []
    for name, figure in figures.items():
        files.append(folder / f"{name}.png")
        with atomic_path(files[-1]) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI)
    return files
