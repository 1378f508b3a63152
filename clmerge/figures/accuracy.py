"""Charts of a run's accuracies: matrices, what happens to each task, over time, at the end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from clmerge.figures.charts import Grid, HeatChart, Line, LineChart, Panel, Value, known_rows
from clmerge.figures.drawing import draw
from clmerge.figures.looks import Look, look_of
from clmerge.results.metrics.continual import average_accuracy
from clmerge.results.results import ZERO_SHOT, Results, Setting


@dataclass(frozen=True)
class Model:
    """A model with its accuracies.

    Attributes:
        name: Its name.
        look: How it looks.
        matrix: Its accuracy matrix R.
        faint: Whether its lines are in the background.
        moves: Whether training changes it; one that it does not change has numbers where others were not evaluated.
    """

    name: str
    look: Look
    matrix: Sequence[Sequence[Value]]
    faint: bool = False
    moves: bool = True


def by_task(values: Sequence[Value]) -> list[tuple[float, Value]]:
    """Return one point for every task."""
    return [(float(index + 1), value) for index, value in enumerate(values)]


def forgetting_chart(
    models: Sequence[Model], tasks: Sequence[str], accuracy: str = "accuracy", *, most: int | None = None
) -> LineChart:
    """Return one panel for every task: the accuracy on it after every evaluated task, and when it was learned.

    Args:
        models: The models, those in front first.
        tasks: Names of the tasks to show.
        accuracy: Name of the vertical axis.
        most: Most panels; of more tasks so many are shown, evenly spaced. Default: all.
    """
    panels = []
    last = max((len(model.matrix) for model in models), default=0) - 1
    evaluated = sorted({0, last, *known_rows([model.matrix for model in models if model.moves])} if last >= 0 else ())
    for task, name in [*enumerate(tasks)][:: 1 if most is None else math.ceil(len(tasks) / most)]:
        lines = [
            Line(
                model.name,
                model.look,
                [(float(row + 1), model.matrix[row][task]) for row in evaluated if row < len(model.matrix)],
                task + 1,
                faint=model.faint,
            )
            for model in models
        ]
        panels.append(Panel(name, lines, rule=task + 1, y_range=(0.0, 1.0)))
    return LineChart(panels, "after task", accuracy)


def plot_matrix(results: Results, model: str, *, setting: Setting | None = None) -> Figure:
    """Draw the accuracy matrix of one model as a heatmap with the numbers in its cells.

    Args:
        results: Results of the run so far.
        model: One of ``results.models``.
        setting: Which reading of the logits; default the results' own.

    Returns:
        A figure; rows are "after task", columns "on task", outlined cells the task just learned.

    Raises:
        ValueError: If there is no such model.
    """
    return plot_matrices(results, [model], setting=setting)


def plot_matrices(results: Results, models: Sequence[str], *, setting: Setting | None = None) -> Figure:
    """Draw the accuracy matrices of several models, with one colour scale.

    Args:
        results: Results of the run so far.
        models: Names from ``results.models``.
        setting: Which reading of the logits; default the results' own.

    Returns:
        A figure with one heatmap per model.

    Raises:
        ValueError: If ``models`` is empty or names an unknown model.
    """
    if not models:
        raise ValueError("expected one or more models to draw, got none")
    setting = setting or results.evaluation
    grids = [Grid(model, _model(results, model, setting).matrix) for model in models]
    after = [str(task + 1) for task in range(results.num_finished)]
    name = _accuracy("accuracy", setting).replace(", ", ",\n")
    return draw(HeatChart(grids, "after task", "on task", after, results.task_labels(), name))


def plot_forgetting_curves(results: Results, *, setting: Setting | None = None) -> Figure:
    """Draw, in one panel per task, the accuracy on that task after every task.

    A vertical line marks when the task was learned. Accuracy before it is zero-shot ability and transfer, drawn thin;
    accuracy after it shows forgetting. Of more than 100 tasks some are shown, evenly spaced.

    Args:
        results: Results of the run so far.
        setting: Which reading of the logits; default the results' own.

    Returns:
        A figure with small multiples and one legend.
    """
    setting = setting or results.evaluation
    models = [_model(results, model, setting) for model in results.models]
    return draw(forgetting_chart(models, results.task_labels(), _accuracy("accuracy", setting), most=100))


def plot_average_accuracy(results: Results, *, setting: Setting | None = None) -> Figure:
    """Draw the average accuracy on the tasks seen so far against the number of tasks, one line per model.

    Args:
        results: Results of the run so far.
        setting: Which reading of the logits; default the results' own.

    Returns:
        A figure whose legend has the last values.
    """
    setting = setting or results.evaluation
    lines = []
    for model in results.models:
        values = [Value(float(value)) for value in average_accuracy(results.matrix(model, setting))]
        lines.append(Line(model, _look(results, model), by_task(values)))
    panel = Panel("", lines, y_range=(0.0, 1.0))
    return draw(LineChart([panel], "after task", _accuracy("average accuracy", setting), shows_last=True))


def plot_final_accuracy(results: Results, *, setting: Setting | None = None) -> Figure:
    """Draw the accuracy on every task after the latest one, the models side by side.

    Args:
        results: Results of the run so far.
        setting: Which reading of the logits; default the results' own.

    Returns:
        A figure with the tasks side by side and one legend.
    """
    setting = setting or results.evaluation
    lines = []
    for index, name in enumerate(results.models):
        model = _model(results, name, setting)
        offset = 0.7 * ((index + 0.5) / len(results.models) - 0.5)
        last = model.matrix[-1] if model.matrix else []
        lines.append(Line(name, model.look, [(x + offset, value) for x, value in by_task(last)]))
    name = _accuracy(f"accuracy after task {results.num_finished}", setting)
    panel = Panel("", lines, y_range=(0.0, 1.0))
    return draw(LineChart([panel], "task", name, dots=True, x_labels=results.task_labels()))


def _model(results: Results, model: str, setting: Setting) -> Model:
    rows = [[Value(float(value)) for value in row] for row in results.matrix(model, setting)]
    return Model(model, _look(results, model), rows, moves=model != ZERO_SHOT)


def _look(results: Results, model: str) -> Look:
    return look_of(model, results.mergers.index(model) if model in results.mergers else None)


def _accuracy(name: str, setting: Setting) -> str:
    return f"{name}, {setting.replace('_', '-')}"
