"""The figures of a report, from the results of the runs."""

from collections.abc import Callable, Iterable, Sequence

from clmerge.figures.accuracy import Model, forgetting_chart
from clmerge.figures.charts import Grid, HeatChart, LineChart, Panel
from clmerge.figures.drawing import MOST_ON_PAGE
from clmerge.figures.numbers import plural
from clmerge.report.charts import Figure, line_of, look, values_of
from clmerge.report.classes import confusion_figures
from clmerge.report.fronts import front_figures
from clmerge.report.probes import probe_figures
from clmerge.report.searches import order_figures, search_figures
from clmerge.report.study import EXPERT, ZERO_SHOT, Entry, Spread, Study
from clmerge.results.results import Setting


def make_figures(study: Study, setting: Setting) -> list[Figure]:
    """Return every accuracy figure that the runs have numbers for, in reading order."""
    return [figure for build in _BUILDERS for figure in build(study, setting)]


def common_figures(study: Study) -> list[Figure]:
    """Return the figures that do not depend on how accuracy is measured, in reading order."""
    return [
        *probe_figures(study),
        *_growth(study),
        *_seconds(study),
        *search_figures(study),
        *front_figures(study),
    ]


MOST_CURVES = 100  # panels of forgetting curves, as in a run's own pictures
MOST_LINES = 7  # number of mergers that are not drawn faintly in the background


def ranked(study: Study, setting: Setting) -> list[Entry]:
    """Return all entries: mergers by average accuracy, then undefined ones, then references."""
    best = study.ranking(setting)
    return best + [entry for entry in study.entries if entry not in best]


def _average_accuracy(study: Study, setting: Setting) -> Iterable[Figure]:
    order = ranked(study, setting)
    lines = [
        line_of(entry, _by_task(entry.series("average_accuracy", setting)), faint=_is_faint(order, entry))
        for entry in order
    ]
    panels = [Panel("All models", lines, y_range=(0.0, 1.0))]
    if mergers := [line for entry, line in zip(order, lines, strict=True) if entry.is_merger]:
        panels.append(Panel("The mergers, enlarged", mergers))
    spread = f" Of more than {MOST_LINES} mergers the best are in front." if len(study.mergers) > MOST_LINES else ""
    spread += f" Bands are one standard deviation over {plural(len(study.runs), 'run')}." if len(study.runs) > 1 else ""
    yield Figure(
        "average_accuracy",
        "Average accuracy after every task",
        "After each task, the mean accuracy on all tasks seen so far: a line that stays high learns new tasks "
        f"without losing old ones.{spread}",
        LineChart(panels, "after task", "average accuracy"),
    )


def _matrices(study: Study, setting: Setting) -> Iterable[Figure]:
    order = ranked(study, setting)
    moving = [entry for entry in order if entry.model != ZERO_SHOT]
    experts = [entry for entry in moving if entry.model == EXPERT]
    others = [entry for entry in moving if entry.model != EXPERT]
    shown = others[:1] + experts + others[1:]  # the best merger beside the expert
    after = [str(task + 1) for task in range(study.num_finished)]
    some = f" Of more than {MOST_ON_PAGE} tasks, {MOST_ON_PAGE} or fewer are shown here, and all in the files."
    yield Figure(
        "matrices",
        "Accuracy on every task after every task",
        "Each row is a moment, each column a task: colours that stay bright down a column mean that the task is "
        "remembered, and outlined cells are the task just learned. The expert is the model as it was fine-tuned, "
        f"without merging.{some if len(study.tasks) > MOST_ON_PAGE else ''}",
        HeatChart(
            [Grid(entry.name, values_of(entry.matrix(setting))) for entry in shown],
            "after task",
            "on task",
            after,
            study.tasks,
            shown=2 + len(experts),
        ),
    )


def _forgetting_curves(study: Study, setting: Setting) -> Iterable[Figure]:
    order = ranked(study, setting)
    models = [
        Model(
            entry.name,
            look(entry),
            values_of(entry.matrix(setting)),
            faint=_is_faint(order, entry),
            moves=entry.model != ZERO_SHOT,
        )
        for entry in order
    ]
    some = f"; of {study.num_finished} tasks, {MOST_CURVES} or fewer" if study.num_finished > MOST_CURVES else ""
    yield Figure(
        "forgetting_curves",
        "What happens to each task",
        f"One panel a task{some}, its accuracy after every task: the vertical line is when it was learned, and a fall "
        "after that is forgetting.",
        forgetting_chart(models, study.tasks[: study.num_finished], most=MOST_CURVES),
    )


def _bytes(study: Study, setting: Setting) -> Iterable[Figure]:
    dots = [
        line_of(entry, [(kept[-1].mean, entry.figure("average_accuracy", setting))])
        for entry in ranked(study, setting)
        if entry.model != EXPERT and _defined(kept := entry.bytes_kept()) and kept[-1].mean > 0
    ]
    if dots:
        yield Figure(
            "bytes_kept",
            "Accuracy against what has to be kept",
            f"Each dot is a model: up is more accurate after {plural(study.num_finished, 'task')}, left is less to "
            "keep from one task to the next, beside the base model.",
            LineChart([Panel("", dots)], "bytes kept", "average accuracy", x_unit="bytes", log_x=True, dots=True),
        )


def _growth(study: Study) -> Iterable[Figure]:
    lines = [line_of(entry, _by_task(kept)) for entry in study.entries if _defined(kept := entry.bytes_kept())]
    if lines and study.num_finished > 1:
        yield Figure(
            "bytes_growth",
            "Growth of what has to be kept",
            "Bytes kept from one task to the next: a flat line does not grow with the number of tasks.",
            LineChart([Panel("", lines)], "after task", "bytes kept", y_unit="bytes"),
        )


def _seconds(study: Study) -> Iterable[Figure]:
    lines = [line_of(entry, _by_task(taken)) for entry in study.entries if _defined(taken := entry.merge_seconds())]
    if lines:
        yield Figure(
            "merge_seconds",
            "Time to merge",
            "Seconds to fold a task in and to read the merged model out, on the machine that did it.",
            LineChart([Panel("", lines)], "after task", "seconds", y_unit="seconds"),
        )


_BUILDERS: Sequence[Callable[[Study, Setting], Iterable[Figure]]] = (
    _average_accuracy,
    _matrices,
    _forgetting_curves,
    confusion_figures,
    _bytes,
    order_figures,
)


def _is_faint(order: Sequence[Entry], entry: Entry) -> bool:
    return entry.is_merger and order.index(entry) >= MOST_LINES


def _by_task(spreads: Sequence[Spread]) -> list[tuple[float, Spread]]:
    return [(float(index + 1), spread) for index, spread in enumerate(spreads)]


def _defined(spreads: Sequence[Spread]) -> bool:
    return bool(spreads) and all(spread.is_defined for spread in spreads)
