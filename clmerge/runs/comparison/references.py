"""References for mergers: zero-shot, sequential, oracle and ensemble of the experts, joint training."""

import itertools
import math

import numpy as np

from clmerge.deploy.predictors import Ensemble, Merged
from clmerge.results.results import ENSEMBLE, EXPERT, JOINT, SETTINGS, TASK_ORACLE, ZERO_SHOT, Results
from clmerge.runs.comparison.row_cache import CachedRow, RowCache, make_row
from clmerge.runs.stored_run import StoredRun


def add_references(results: Results, run: StoredRun, cache: RowCache, joint: StoredRun | None) -> None:
    """Add the reference rows of a run.

    Zero-shot and expert are taken from the results of ``fit``; the oracle, which needs the task of every image and so
    has task-aware accuracies alone, is read off the expert's.

    Args:
        results: The results to add to.
        run: The run.
        cache: Stores the evaluated rows.
        joint: A run that was trained on all classes together, if there is one.

    Raises:
        ValueError: If the joint run has other classes or another model.
    """
    tasks = run.kept
    weights = 4 * run.num_parameters
    grows = list(itertools.accumulate(run.bank.path(task).stat().st_size for task in tasks))
    expert = {setting: run.results.matrix(EXPERT, setting)[np.ix_(tasks, tasks)] for setting in SETTINGS}
    data = run.folder.manifest.data
    results.describe(EXPERT, kind="unmerged", data=data)
    results.describe(TASK_ORACLE, kind="per_task", data=data)
    results.describe(ENSEMBLE, kind="ensemble", data=data)
    own = expert["task_aware"].diagonal().tolist()
    unknown = [math.nan] * len(tasks)
    for t in range(len(tasks)):
        results.add_row(EXPERT, *(expert[setting][t] for setting in SETTINGS), bytes_kept=weights)
    for t in range(len(tasks)):
        results.add_row(TASK_ORACLE, unknown, own[: t + 1] + unknown[t + 1 :], bytes_kept=grows[t])
    for t, row in enumerate(ensemble(run, cache)):
        results.add_row(ENSEMBLE, *(run.counted(row[setting]) for setting in SETTINGS), bytes_kept=grows[t])
        add_confusion(results, run, ENSEMBLE, row)
    if len(tasks) == len(run.tasks):
        for model in (EXPERT, ZERO_SHOT):
            results.take_confusion(model, run.results)
    if ZERO_SHOT in run.results.models:
        results.set_zero_shot(*(run.results.matrix(ZERO_SHOT, setting)[0][tasks] for setting in SETTINGS))
    if joint is not None:
        row = joint_row(run, joint, cache)
        for _ in tasks:
            results.add_row(JOINT, *(run.counted(row[setting]) for setting in SETTINGS), bytes_kept=weights)
        add_confusion(results, run, JOINT, row)


def add_confusion(results: Results, run: StoredRun, model: str, row: CachedRow) -> None:
    """Add the answers of a finished model by class, if its row has them and all tasks of the run count."""
    if "confusion" in row and len(run.kept) == len(run.tasks):
        results.set_confusion(model, row["confusion"])


def ensemble(run: StoredRun, cache: RowCache) -> list[CachedRow]:
    """Return the accuracies, after every task, of averaging the experts' probabilities so far.

    Every expert is evaluated on the images once.

    Args:
        run: The run.
        cache: Keeps the rows.
    """
    tasks = run.kept
    keys = [cache.key(run.identity, ENSEMBLE, "test", tasks[: t + 1]) for t in range(len(tasks))]
    if not all(key in cache for key in keys):
        predictor = Ensemble()
        rows = {}
        for t, (task, key) in enumerate(zip(tasks, keys, strict=True), start=1):
            label = f"{run.name}: task {t}/{len(tasks)}: ensemble of experts, test images"
            run.enter(task)
            predictor.add(run.expert(task))
            confusion = t == len(run.tasks)
            rows[key] = make_row(run.evaluate_again(label, {ENSEMBLE: predictor}, task, confusion=confusion)[ENSEMBLE])
        cache.add(rows)
    return [cache[key] for key in keys]


def check_joint(run: StoredRun, joint: StoredRun) -> None:
    """Refuse a joint run of other classes, or of another model.

    Raises:
        ValueError: If the classes or the models differ.
    """
    for what, ours, theirs in (
        ("classes", run.stream.class_names, joint.stream.class_names),
        ("backbone", run.config["model"]["backbone"], joint.config["model"]["backbone"]),
    ):
        if ours != theirs:
            raise ValueError(
                f"expected the {what} of {run.folder.path} in the joint run {joint.folder.path}, got others"
            )


def joint_row(run: StoredRun, joint: StoredRun, cache: RowCache) -> CachedRow:
    """Return the accuracies of the un-merged final model of another run on the tasks of this one.

    Args:
        run: The run whose tasks are evaluated.
        joint: The other run.
        cache: Keeps the row.

    Raises:
        ValueError: If the other run has other classes or another model.
    """
    check_joint(run, joint)
    key = cache.key(run.identity, f"{JOINT} {joint.identity}", "test", [])
    if key not in cache:
        joint.enter(len(joint.tasks) - 1)
        trainer = run.trainers.for_evaluation(f"{run.name}: joint training, test images")
        rows = run.evaluate(trainer, {JOINT: Merged()}, len(run.tasks) - 1, module=joint.module, confusion=True)
        cache.add({key: make_row(rows[JOINT])})
    return cache[key]
