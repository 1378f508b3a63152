"""What W&B, CSV, TensorBoard and other Lightning loggers are told about a stream, by exact name.

After every task each logger gets, for every model (``magmax`` ..., ``expert``, ``zero_shot``)::

    cl/task                                       number of tasks learned so far, 1, 2, ...; the x-axis
    cl/MODEL/average_accuracy                     after this task; and so on for the other figures
    cl/MODEL/forgetting, backward_transfer, forward_transfer, average_incremental_accuracy, learning_accuracy
    cl/MODEL/accuracy/TASK                        accuracy on one task

and the same under ``cl_task_aware/`` for the task-aware reading. Undefined figures are left out. W&B also
gets the matrix of every model as an image (``cl/MODEL/R``) and a table (``cl/MODEL/R_table``). All of W&B's
peculiarities are in this file; ``wandb`` is imported only where a run is started or a ``WandbLogger`` is at
hand.
"""

import logging
import math
import netrc
import os
import queue
import shlex
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from clmerge.results import ZERO_SHOT, Results, Setting

if TYPE_CHECKING:
    from wandb import Run

TASK_KEY = "cl/task"
FIGURES: Final = (
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "average_incremental_accuracy",
    "learning_accuracy",
)
_PREFIXES: dict[str, Setting] = {"cl": "task_agnostic", "cl_task_aware": "task_aware"}
_STEP_KEY = "trainer/global_step"
_CONNECT_SECONDS = 2.0
_INIT_SECONDS = 20.0

_log = logging.getLogger(__name__)


@rank_zero_only
def log_task(loggers: Sequence[Logger], results: Results, task_index: int, *, images: bool = True) -> None:
    """Tell every logger the figures after a task.

    Loggers other than W&B's get one ``log_metrics`` call whose step is the number of tasks learned, so that
    curves are drawn against tasks; they are flushed afterwards.

    Args:
        loggers: Any Lightning loggers.
        results: What the run found so far, the task's rows included. Rows of later tasks are left out, so
            that a resumed run can tell a logger again what it may have lost.
        task_index: Index of the task, from 0.
        images: Whether W&B gets the matrices as images and tables (0.2 seconds per model and task).

    Raises:
        ValueError: If the results do not hold that task.
    """
    if not 0 <= task_index < results.num_finished:
        raise ValueError(f"expected one of {results.num_finished} finished tasks, got task {task_index}")
    results = results.until(task_index + 1)
    metrics = task_metrics(results)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _log_to_wandb(logger.experiment, results, metrics, images)
        else:
            logger.log_metrics({TASK_KEY: task_index + 1.0, **metrics}, step=task_index + 1)
        logger.save()


@rank_zero_only
def log_summary(loggers: Sequence[Logger], results: Results) -> None:
    """Tell W&B the final figures, the best merger, and show the pictures that compare the models.

    Other loggers have the final figures already, as those of the last task.

    Args:
        loggers: Any Lightning loggers.
        results: What the run found, at least one finished task.
    """
    from clmerge.plots import plot_average_accuracy, plot_final_accuracy, plot_forgetting_curves

    pictures = {
        "cl/average_accuracy_curves": plot_average_accuracy,
        "cl/forgetting_curves": plot_forgetting_curves,
        "cl/final_accuracy": plot_final_accuracy,
    }
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            run = logger.experiment
            for name in pictures:
                run.define_metric(name, step_metric=TASK_KEY)
            drawn = {name: wandb.Image(draw(results)) for name, draw in pictures.items()}
            run.log({TASK_KEY: results.num_finished, **drawn})
            run.summary.update({**task_metrics(results), "cl/best_merger": results.best_merger()})


@rank_zero_only
def finish_loggers(loggers: Sequence[Logger], *, success: bool = True) -> None:
    """Write out and close every logger; W&B runs end here rather than at the end of the process.

    Args:
        loggers: Any Lightning loggers.
        success: Whether the run completed.
    """
    for logger in loggers:
        logger.finalize("success" if success else "failed")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish(exit_code=0 if success else 1)


def task_metrics(results: Results) -> dict[str, float]:
    """Return every defined figure after the latest task under the name loggers know it by.

    Args:
        results: What the run found so far, at least one finished task.

    Returns:
        Names such as ``cl/magmax/forgetting`` to numbers; undefined figures are left out.

    Example:
        >>> results = Results(["a", "b"], classes=[["0"], ["1"]])
        >>> results.add_row("ties", [1.0, 0.25], [1.0, 0.5])
        >>> metrics = task_metrics(results)
        >>> metrics["cl/ties/average_accuracy"], metrics["cl_task_aware/ties/accuracy/b"]
        (1.0, 0.5)
        >>> "cl/ties/forgetting" in metrics
        False
    """
    metrics: dict[str, float] = {}
    for prefix, setting in _PREFIXES.items():
        for model in results.models:
            figures = results.figures(model, setting)
            metrics[f"{prefix}/{model}/average_accuracy"] = figures["average_accuracy"][-1]
            metrics |= {f"{prefix}/{model}/{name}": figures[name] for name in FIGURES}
            row = zip(results.tasks, figures["R"][-1], strict=True)
            metrics |= {f"{prefix}/{model}/accuracy/{task}": accuracy for task, accuracy in row}
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def build_wandb_logger(
    save_dir: str | Path,
    *,
    project: str = "clmerge",
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    run_id: str | None = None,
    config: Mapping[str, Any] | None = None,
    online: bool = False,
) -> WandbLogger:
    """Start (or continue) a W&B run whose files lie below a folder, and wrap it in a Lightning logger.

    The run is offline unless the user asks for online or is logged in to W&B, and unless the server can be
    reached within two seconds: a machine without network must not wait for W&B's own time-out of a minute and
    a half. ``WANDB_MODE`` and ``wandb offline`` are respected. Which mode was chosen, and why, is logged.

    Lightning's ``WandbLogger(offline=True)`` would set ``WANDB_MODE`` for the whole process and everything it
    starts; here the mode stays with the run.

    Args:
        save_dir: Folder for the run's files; W&B adds ``wandb/`` to it.
        project: Project of the run.
        name: Name of the run; W&B invents one by default.
        group: Group of the run.
        tags: Tags of the run.
        run_id: Identity of the run; the same one after a resume continues it.
        config: Configuration to show with the run.
        online: Whether to go online although the user is not logged in (W&B then asks for a key).

    Returns:
        A logger; on ranks other than zero it holds no run.
    """
    logger_arguments: dict[str, Any] = {
        "save_dir": str(save_dir),
        "project": project,
        "name": name,
        "id": run_id,
    }
    if getattr(rank_zero_only, "rank", 0) != 0:
        return WandbLogger(**logger_arguments)
    import wandb
    from wandb.errors import CommError

    Path(save_dir).mkdir(parents=True, exist_ok=True)
    mode = _choose_mode(online)

    def start(mode: Literal["online", "offline", "disabled"]) -> "Run":
        return wandb.init(
            mode=mode,
            dir=str(save_dir),
            project=project,
            name=name,
            group=group,
            tags=list(tags),
            id=run_id,
            resume="allow",
            config=dict(config or {}),
            # A run that the caller has in progress is left alone instead of being logged into.
            reinit="create_new" if wandb.run is not None else None,
            settings=wandb.Settings(init_timeout=_INIT_SECONDS, quiet=True, silent=mode == "offline"),
        )

    try:
        run = start(mode)
    except CommError as error:
        if mode != "online" or wandb.run is not None:
            raise
        _log.warning("W&B: offline, because the server was reached but did not answer: %s", error)
        wandb.teardown()  # its background process would refuse the same run id a second time
        run = start("offline")
    # Lightning defines these only for runs it starts itself: training curves lie on one axis over all tasks.
    run.define_metric(_STEP_KEY)
    run.define_metric("*", step_metric=_STEP_KEY, step_sync=True)
    return WandbLogger(experiment=run, **logger_arguments)


def wandb_sync_command(run_dir: str | Path) -> str | None:
    """Return the command that uploads the offline W&B runs below a folder.

    Args:
        run_dir: The run folder.

    Returns:
        A command for a shell, oldest run first; None if there is no offline run.

    Example:
        >>> import tempfile
        >>> wandb_sync_command(tempfile.mkdtemp()) is None
        True
    """
    folders = sorted(Path(run_dir).glob("**/wandb/offline-run-*"))
    return shlex.join(["wandb", "sync", *map(str, folders)]) if folders else None


def _log_to_wandb(run: "Run", results: Results, metrics: Mapping[str, float], images: bool) -> None:
    run.define_metric(TASK_KEY)
    for name in metrics:
        _define(run, name)
    # No step= here: W&B drops rows whose step lies behind its own, and the tasks' axis is cl/task.
    run.log({TASK_KEY: results.num_finished, **metrics})
    if not images:
        return
    import wandb

    from clmerge.plots import plot_matrix

    media: dict[str, Any] = {}
    for model in results.models:
        if model != ZERO_SHOT:
            media[f"cl/{model}/R"] = wandb.Image(plot_matrix(results, model))
        for prefix, setting in _PREFIXES.items():
            # A new table every time: W&B silently keeps the first version of one that is logged again.
            media[f"{prefix}/{model}/R_table"] = wandb.Table(
                columns=["after_task", "on_task", "task", "accuracy"],
                data=[
                    [row + 1, column + 1, results.tasks[column], None if math.isnan(accuracy) else accuracy]
                    for row, accuracies in enumerate(results.matrix(model, setting).tolist())
                    for column, accuracy in enumerate(accuracies)
                ],
            )
    for name in media:
        _define(run, name)
    run.log({TASK_KEY: results.num_finished, **media})


def _define(run: "Run", name: str) -> None:
    """Give a metric the tasks' axis. By exact name: of two globs that match, W&B picks one at random."""
    # A bare dot would mean a nested value, and labels such as "ties_density0.1" hold dots.
    run.define_metric(name.replace(".", "\\."), step_metric=TASK_KEY)


def _choose_mode(online: bool) -> Literal["online", "offline", "disabled"]:
    """Decide where a run goes, and log why."""
    import wandb

    settings = wandb.setup().settings
    if settings.mode in ("offline", "disabled"):
        _log.info("W&B: %s, as WANDB_MODE or W&B's own settings say", settings.mode)
        return "offline" if settings.mode == "offline" else "disabled"
    asked = online or "WANDB_MODE" in os.environ
    logged_in = bool(settings.api_key) or _in_netrc(settings.base_url)
    if not (asked or logged_in):
        _log.info("W&B: offline, because you are not logged in (`wandb login`) and did not ask for online")
        return "offline"
    if not _reachable(settings.base_url):
        level = logging.WARNING if asked else logging.INFO
        _log.log(level, "W&B: offline, because %s did not accept a connection in time", settings.base_url)
        return "offline"
    reason = "you asked for it" if asked else "you are logged in"
    _log.info("W&B: online at %s, because %s", settings.base_url, reason)
    return "online"


def _in_netrc(url: str) -> bool:
    """Tell whether the netrc file, where ``wandb login`` writes, knows the server or W&B's public one."""
    named = os.environ.get("NETRC")
    for path in [named] if named else ["~/.netrc", "~/_netrc"]:
        file = Path(path).expanduser()
        if file.is_file():
            try:
                hosts = netrc.netrc(file).hosts
            except (netrc.NetrcParseError, OSError) as error:
                _log.warning("W&B: cannot read %s, so nobody is logged in: %s", file, error)
                return False
            return not hosts.keys().isdisjoint({urlsplit(url).netloc, "api.wandb.ai"})
    return False


def _reachable(url: str) -> bool:
    """Tell whether the server, or the proxy on the way to it, accepts a connection within two seconds."""
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if proxy and parts.hostname and not proxy_bypass(parts.hostname):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def connect() -> None:
        try:
            socket.create_connection(address, _CONNECT_SECONDS).close()
            answers.put(True)
        except OSError:
            answers.put(False)

    # In a thread, because looking the name up can take far longer than connecting and has no time-out.
    threading.Thread(target=connect, daemon=True).start()
    try:
        return answers.get(timeout=_CONNECT_SECONDS)
    except queue.Empty:
        return False
