"""Charts of which classes are taken for which."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from clmerge.figures.charts import Grid, HeatChart, Value
from clmerge.figures.drawing import draw
from clmerge.results.confusion import Confusion, summed
from clmerge.results.results import Results, Setting

MOST_SHOWN = 20  # classes of a heatmap, so that every one has its name


def confusion_chart(confusions: Mapping[str, Confusion], names: Sequence[str], which: str = "") -> HeatChart:
    """Return one heatmap per model: the share of the images of a class that were taken for each class.

    Of many classes the 20 that most wrong answers of all models are about are shown, in their order.

    Args:
        confusions: The answers by the name of the model, with pairs of classes.
        names: Names of the classes.
        which: Which reading of the logits they are, for the name of the scale.
    """
    shown = summed(list(confusions.values())).most_confused(MOST_SHOWN)
    some = "" if len(shown) == len(names) else f" ({len(shown)} of {len(names)})"
    labels = [names[index] for index in shown]
    grids = [Grid(name, _shares(found, shown)) for name, found in confusions.items()]
    scale = f"images of the class{which}"
    return HeatChart(grids, f"class{some}", "taken for", labels, labels, scale, shown=3)


def plot_confusion(results: Results, models: Sequence[str], *, setting: Setting | None = None) -> Figure:
    """Draw the confusion matrices of finished models, with one colour scale.

    Args:
        results: Results of the run.
        models: Names from ``results.models`` whose answers were counted by class.
        setting: Which reading of the logits; default the results' own.

    Raises:
        ValueError: If answers were not counted, or not by pairs of classes.
    """
    setting = setting or results.evaluation
    found: dict[str, Confusion] = {}
    for model in models:
        confusion = results.confusion(model, setting)
        if confusion is None or confusion.wrong is None:
            raise ValueError(f"expected answers of {model!r} by pairs of classes, got none")
        found[model] = confusion
    return draw(confusion_chart(found, results.class_names, f",\n{setting.replace('_', '-')}"))


def confused(results: Results, models: Sequence[str], setting: Setting | None = None) -> list[str]:
    """Return the models whose answers were counted by pairs of classes."""
    found = {model: results.confusion(model, setting) for model in models}
    return [model for model, answers in found.items() if answers is not None and answers.wrong is not None]


def _shares(found: Confusion, shown: Sequence[int]) -> list[list[Value]]:
    matrix, images = found.matrix(), found.images
    return [[Value(int(matrix[i, j]) / images[i] if images[i] else math.nan) for j in shown] for i in shown]
