"""A finished run on a stream that it was not trained on: the classes and the head that stand for the new classes."""

import math
from collections.abc import Mapping, Sequence

from clmerge.deploy.predictors import Predictor
from clmerge.deploy.selected import Selected
from clmerge.results.confusion import ModelRow
from clmerge.results.results import ZERO_SHOT, Results
from clmerge.runs.session import Session
from clmerge.runs.stored_run import StoredRun
from clmerge.streams import Stream


def on_stream(run: StoredRun, stream: Stream, names: Sequence[str]) -> tuple[Session, dict[str, Predictor]]:
    """Return a session and predictors with which models of a run are evaluated on another stream.

    A text head is made anew from the class names and templates of the stream, by the text tower before the first task.
    A learned head must know every class by name.

    Args:
        run: The run; the session uses its module and data from now on.
        stream: The other stream.
        names: Names of models of the run.

    Raises:
        ValueError: If a learned head lacks a class, or a model with a view per task gets a task whose classes are not
            all of one of its tasks.
    """
    predictors = {run.models.resolve(name): run.predictor(name) for name in names}
    text = run.module.head.open_vocabulary
    classes = stream.class_names
    tasks = [_task_of(run.results, task.class_names) for task in stream.tasks]
    if lost := [name for name, each in predictors.items() if each.needs_task and None in tasks]:
        task = stream.tasks[tasks.index(None)].name
        raise ValueError(
            f"expected classes of one task of {run.folder.path} in every task of the stream for {lost[0]}, which needs "
            f"to be told the task, got others in {task}; leave {lost[0]} out with --models"
        )
    known = [0 if task is None else task for task in tasks]
    if text:
        run.models.build_head(run.module, stream.class_prompts)
        columns = list(range(len(classes)))
    else:
        columns = columns_of(run.stream.class_names, classes, str(run.folder.path))
    run.data.setup_stream(stream, run.module.backbone.train_transform, run.module.backbone.eval_transform)
    session = Session(stream, run.module, run.data, seed=run.seed)
    return session, {name: Selected(each, columns, known) for name, each in predictors.items()}


def columns_of(known: Sequence[str], wanted: Sequence[str], run: str) -> list[int]:
    """Return the positions of class names, which may differ in case, among those that a learned head knows.

    Args:
        known: Names of the classes of the run.
        wanted: Names of the classes to find.
        run: The run, for messages.

    Raises:
        ValueError: If one is missing.
    """
    places = {name.casefold(): index for index, name in enumerate(known)}
    if missing := [name for name in wanted if name.casefold() not in places]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"expected classes that the learned head of {run} knows ({', '.join(known[:8])}"
            f"{', ...' if len(known) > 8 else ''}), got {missing[0]!r}{more}: only a text head can name classes that "
            "it was not trained on"
        )
    return [places[name.casefold()] for name in wanted]


def _task_of(results: Results, names: Sequence[str]) -> int | None:
    """Return the task of a run that has all of the classes; None if there is none."""
    wanted = {name.casefold() for name in names}
    return next((task for task, own in enumerate(results.classes) if wanted <= {name.casefold() for name in own}), None)


def final_rows(results: Results, rows: Mapping[str, ModelRow]) -> Results:
    """Add the row of every finished model after the last task; those of earlier tasks are undefined, nobody saw them.

    Args:
        results: Results without rows.
        rows: The rows by model, with the answers by class.
    """
    for name, row in rows.items():
        if name == ZERO_SHOT:
            results.set_zero_shot(row["task_agnostic"], row["task_aware"])
        else:
            unknown = [math.nan] * len(results.tasks)
            for _ in results.tasks[:-1]:
                results.add_row(name, unknown, unknown)
            results.add_row(name, row["task_agnostic"], row["task_aware"])
        results.set_confusion(name, row["confusion"])
    return results
