"""Log a stream to any Lightning loggers: figures after every task, pictures, final summary and artifacts."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from clmerge.loggers import weights_and_biases
from clmerge.loggers.facts import RunFacts
from clmerge.loggers.metrics import TASK_KEY, by_task_metrics, deployed_model, figure_metrics, part_of_key, task_metrics
from clmerge.loggers.tasks_csv import write_tasks
from clmerge.results.results import ZERO_SHOT, Results
from clmerge.results.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MLFLOW_BATCH = 1000  # largest number of metrics of one call


@rank_zero_only
def log_facts(loggers: Sequence[Logger], facts: RunFacts) -> None:
    """Log the configuration to every logger except W&B's, whose run was started with it.

    Args:
        loggers: Any Lightning loggers.
        facts: Description of the run.
    """
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            logger.log_hyperparams(dict(facts.settings))


@rank_zero_only
def log_task(
    loggers: Sequence[Logger],
    results: Results,
    task_index: int,
    *,
    deployed: str | None = None,
    images: bool = True,
) -> None:
    """Log the figures after a task to every logger.

    Loggers other than W&B's get one ``log_metrics`` call whose step is the number of tasks learned, so that
    curves are drawn against tasks; they are flushed afterwards. For CSV, numbers of single tasks go to ``tasks.csv``.

    Args:
        loggers: Any Lightning loggers.
        results: Results of the run, the task's rows included. Rows of later tasks are left out, so that a resumed
            run can log again what a logger may have lost.
        task_index: Index of the task, from 0.
        deployed: The run's deployed model. Default: the first merger.
        images: Whether the matrices are shown as images and tables (0.2 seconds per model and task).

    Raises:
        ValueError: If the results lack that task.
    """
    if not 0 <= task_index < results.num_finished:
        raise ValueError(f"expected one of {results.num_finished} finished tasks, got task {task_index}")
    results = results.until(task_index + 1)
    figures, by_task = figure_metrics(results, deployed), by_task_metrics(results)
    metrics = figures | by_task
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            weights_and_biases.log_metrics(logger.experiment, task_index + 1, metrics)
            if images:
                weights_and_biases.log_tables(logger.experiment, results)
        elif isinstance(logger, CSVLogger):
            _log_metrics(logger, {TASK_KEY: task_index + 1.0, **figures}, task_index + 1)
            write_tasks(logger, by_task, task_index + 1)
        else:
            _log_metrics(logger, {TASK_KEY: task_index + 1.0, **metrics}, task_index + 1)
    if images:
        from clmerge.figures import plot_matrix

        moving = [model for model in results.models if model != ZERO_SHOT]
        _show(
            loggers,
            {f"cl_matrix/{part_of_key(model)}": partial(plot_matrix, results, model) for model in moving},
            task_index + 1,
        )
    for logger in loggers:
        logger.save()


@rank_zero_only
def log_summary(loggers: Sequence[Logger], results: Results, *, deployed: str | None = None) -> None:
    """Log the pictures that compare the models, and set the final figures as the summary of W&B's run.

    Other loggers already have the final figures, as those of the last task.

    Args:
        loggers: Any Lightning loggers.
        results: Results of the run, at least one finished task.
        deployed: The run's deployed model. Default: the first merger.
    """
    from clmerge.figures import (
        plot_average_accuracy,
        plot_confusion,
        plot_final_accuracy,
        plot_forgetting_curves,
        plot_probe,
        probe_charts,
    )
    from clmerge.figures.confusion import confused

    pictures = {
        "cl/average_accuracy_curves": partial(plot_average_accuracy, results),
        "cl/forgetting_curves": partial(plot_forgetting_curves, results),
        "cl/final_accuracy": partial(plot_final_accuracy, results),
    }
    for model in confused(results, results.models):
        pictures[f"cl_confusion/{part_of_key(model)}"] = partial(plot_confusion, results, [model])
    for probe in probe_charts(results):
        pictures[f"cl_probe/{part_of_key(probe)}"] = partial(plot_probe, results, probe)
    _show(loggers, pictures, results.num_finished)
    summary = {
        **task_metrics(results, deployed),
        "cl/deployed": deployed_model(results, deployed),
        "cl/best_merger": results.best_merger(),
        "cl/evaluation": results.evaluation,
        **{f"cl_data/{part_of_key(model)}": results.model(model).data for model in results.mergers},
    }
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            weights_and_biases.log_chart(logger.experiment, results)
            weights_and_biases.log_classes(logger.experiment, results, deployed_model(results, deployed))
            weights_and_biases.summarise(logger.experiment, summary)


@rank_zero_only
def log_comparison(loggers: Sequence[Logger], results: Results) -> None:
    """Log a comparison of one run to every logger: each model's figures after every task, and searches as tables.

    Args:
        loggers: Any Lightning loggers.
        results: Results of the run under the compared mergers.
    """
    for task in range(results.num_finished):
        log_task(loggers, results, task, images=task == results.num_finished - 1)
    log_summary(loggers, results)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            weights_and_biases.log_searches(logger.experiment, results.searches)


@rank_zero_only
def log_artifacts(loggers: Sequence[Logger], run: RunFolder, results: Results) -> None:
    """Log base, task vectors and merged models of a finished run to W&B as artifacts.

    Args:
        loggers: Any Lightning loggers; only W&B's have artifacts.
        run: The run folder, with a bank and final models.
        results: Results of the run.

    Raises:
        ValueError: If the run has kept no task vectors.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            weights_and_biases.log_artifacts(logger.experiment, run, results)


@rank_zero_only
def finish_loggers(loggers: Sequence[Logger], *, success: bool = True) -> None:
    """Flush and close every logger; W&B runs end here rather than at the end of the process.

    Args:
        loggers: Any Lightning loggers.
        success: Whether the run completed.
    """
    for logger in loggers:
        logger.finalize("success" if success else "failed")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish(exit_code=0 if success else 1)


def _log_metrics(logger: Logger, metrics: Mapping[str, float], step: int) -> None:
    """Log metrics to any logger but W&B's; to MLflow in parts and under names that it accepts."""
    if not isinstance(logger, MLFlowLogger):
        logger.log_metrics(dict(metrics), step=step)
        return
    found = list(zip(mlflow_names(list(metrics)), metrics.values(), strict=True))
    for start in range(0, len(found), _MLFLOW_BATCH):
        logger.log_metrics(dict(found[start : start + _MLFLOW_BATCH]), step=step)


def mlflow_names(names: Sequence[str]) -> list[str]:
    """Return names of metrics in the letters that Lightning's logger for MLflow passes on, all different.

    Example:
        >>> mlflow_names(["cl_forgetting/magmax+tuned", "cl/task"])
        ['cl_forgetting/magmax_tuned', 'cl/task']
    """
    taken: set[str] = set()
    found = []
    for name in names:
        own = plain = re.sub(r"[^a-zA-Z0-9_/. -]", "_", name)
        count = 1
        while own in taken:
            count += 1
            own = f"{plain}-{count}"
        taken.add(own)
        found.append(own)
    return found


def _show(loggers: Sequence[Logger], draw: "Mapping[str, Callable[[], Figure]]", num_tasks: int) -> None:
    """Log pictures to W&B, TensorBoard and MLflow, each by its own method; draw them only if one of these is used."""
    able = [logger for logger in loggers if isinstance(logger, (WandbLogger, TensorBoardLogger, MLFlowLogger))]
    if not able:
        return
    pictures = {name: function() for name, function in draw.items()}
    for logger in able:
        if isinstance(logger, WandbLogger):
            weights_and_biases.log_pictures(logger.experiment, pictures, num_tasks)
            continue
        for name, picture in pictures.items():
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(name, picture, global_step=num_tasks)
            else:
                logger.experiment.log_figure(logger.run_id, picture, f"{name}_{num_tasks:03d}.png")
