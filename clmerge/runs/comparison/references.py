"""References for mergers: zero-shot, sequential, oracle and ensemble of the experts, joint training."""

import math

import torch

from clmerge.runs.comparison.ledger import Ledger, Row, make_row
from clmerge.runs.comparison.stored_run import StoredRun
from clmerge.evaluation.evaluate import evaluate, probabilities
from clmerge.results.metrics import TaskAccuracy
from clmerge.deploy.predictors import Merged
from clmerge.results.results import ENSEMBLE, EXPERT, JOINT, SETTINGS, TASK_ORACLE, ZERO_SHOT, Results


def add_references(results: Results, run: StoredRun, ledger: Ledger, joint: StoredRun | None) -> None:
    """Add the reference rows of a run.

    Zero-shot and expert are taken from the results of ``fit``; the oracle is computed from them.

    Args:
        results: The results to add to.
        run: The run.
        ledger: Stores the evaluated rows.
        joint: A run that was trained on all classes together, if there is one.

    Raises:
        ValueError: If the joint run has other classes or another model.
    """
    num_tasks = len(run.tasks)
    expert = {setting: run.results.matrix(EXPERT, setting) for setting in SETTINGS}
    for task in range(num_tasks):
        results.add_row(EXPERT, *(expert[setting][task] for setting in SETTINGS))
    if ZERO_SHOT in run.results.models:
        results.set_zero_shot(*(run.results.matrix(ZERO_SHOT, setting)[0] for setting in SETTINGS))
    for task in range(num_tasks):
        own = {setting: [float(value) for value in expert[setting].diagonal()[: task + 1]] for setting in SETTINGS}
        results.add_row(TASK_ORACLE, *(own[s] + [math.nan] * (num_tasks - task - 1) for s in SETTINGS))
    for row in ensemble(run, ledger):
        results.add_row(ENSEMBLE, row["task_agnostic"], row["task_aware"])
    if joint is not None:
        row = joint_row(run, joint, ledger)
        for _ in range(num_tasks):
            results.add_row(JOINT, row["task_agnostic"], row["task_aware"])


def ensemble(run: StoredRun, ledger: Ledger) -> list[Row]:
    """Return the accuracies, after every task, of averaging the experts' probabilities so far (arXiv 1612.01474).

    Every expert is evaluated on the images once; only the sum of the probabilities is kept.

    Args:
        run: The run.
        ledger: Keeps the rows.
    """
    tasks = list(range(len(run.tasks)))
    keys = [ledger.key(run.identity, ENSEMBLE, "test", tasks[: task + 1]) for task in tasks]
    if not all(key in ledger for key in keys):
        total = torch.zeros(())
        rows = {}
        for task, key in enumerate(keys):
            label = f"{run.name}: task {task + 1}/{len(tasks)}: ensemble of experts, test images"
            run.enter(task)
            trainer = run.trainers.for_evaluation(label)
            found, labels, owners = probabilities(trainer, run.module, run.expert(task), run.data)
            total = total + found
            known = len(tasks) if run.module.head.open_vocabulary else task + 1
            rows[key] = _row(run, total, labels, owners, known)
        ledger.add(rows)
    return [ledger[key] for key in keys]


def _row(run: StoredRun, scores: torch.Tensor, labels: torch.Tensor, owners: torch.Tensor, known: int) -> Row:
    accuracy = TaskAccuracy(len(run.tasks), scores.shape[1], [task.classes for task in run.tasks])
    accuracy.update(scores, labels, owners)
    found = {name: values.tolist() for name, values in accuracy.compute().items()}
    unknown = [math.nan] * (len(run.tasks) - known)
    return make_row({setting: found[setting][:known] + unknown for setting in SETTINGS})


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


def joint_row(run: StoredRun, joint: StoredRun, ledger: Ledger) -> Row:
    """Return the accuracies of the un-merged final model of another run on the tasks of this one.

    Args:
        run: The run whose tasks are evaluated.
        joint: The other run.
        ledger: Keeps the row.

    Raises:
        ValueError: If the other run has other classes or another model.
    """
    check_joint(run, joint)
    key = ledger.key(run.identity, f"{JOINT} {joint.identity}", "test", [])
    if key not in ledger:
        joint.enter(len(joint.tasks) - 1)
        rows = evaluate(
            run.trainers.for_evaluation(f"{run.name}: joint training, test images"),
            joint.module,
            {JOINT: Merged()},
            run.data,
            task_classes=[task.classes for task in run.tasks],
            num_classes=len(run.stream.class_names),
        )
        ledger.add({key: make_row(rows[JOINT])})
    return ledger[key]
