"""Code specific to Weights & Biases: starting a run, the axes of its metrics, tables, artifacts.

``wandb`` is imported only where a run is started or used. Behaviour of W&B that this file depends on:

- Metrics get their axis by exact name: of two globs that match, W&B picks one at random.
- Nothing is logged with ``step=``: W&B drops rows whose step is smaller than its own. The tasks' axis is ``cl/task``.
- Every table is a new object: W&B silently keeps the first version of one that is logged again.
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
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from clmerge.loggers.metrics import PREFIXES, TASK_KEY, part_of_key
from clmerge.loggers.steady import SteadyRun
from clmerge.loggers.without_launch import without_launch
from clmerge.results.results import Results
from clmerge.results.run_folder import RunFolder
from clmerge.weights import TaskVectorBank, load_metadata, write_json_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from wandb import Artifact, Run

_STEP_KEY = "trainer/global_step"
_CONNECT_SECONDS = 2.0
_INIT_SECONDS = 20.0
_MOST_IN_MATRIX = 100  # classes: W&B keeps 10 000 rows of a table

_log = logging.getLogger(__name__)


def build_wandb_logger(
    save_dir: str | Path,
    *,
    project: str = "clmerge",
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    run_id: str | None = None,
    job_type: str | None = None,
    config: Mapping[str, Any] | None = None,
    online: bool = False,
) -> WandbLogger:
    """Start (or continue) a W&B run whose files are below a folder, and wrap it in a Lightning logger.

    The run is online only if the user asks for it or is logged in to W&B, and if the server can be reached within
    two seconds: a machine without network must not wait for W&B's own time-out of a minute and a half.
    ``WANDB_MODE`` and ``wandb offline`` are respected. The chosen mode and its reason are logged.

    Lightning's ``WandbLogger(offline=True)`` would set ``WANDB_MODE`` for the whole process and its children; here
    the mode applies to this run only.

    Args:
        save_dir: Folder for the run's files; W&B adds ``wandb/`` to it.
        project: Project of the run.
        name: Name of the run; W&B invents one by default.
        group: Group of the run.
        tags: Tags of the run.
        run_id: Identity of the run; a resumed run continues under the same one. Default: W&B's choice, or the one
            that an agent of a sweep has set.
        job_type: Kind of run: ``fit``, ``compare``.
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
    from wandb.errors import CommError, UsageError

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
            job_type=job_type,
            resume="allow",
            config=dict(config or {}),
            # If the caller has a run in progress, start another one instead of logging into it.
            reinit="create_new" if wandb.run is not None else None,
            settings=wandb.Settings(init_timeout=_INIT_SECONDS, quiet=True, silent=mode == "offline"),
        )

    try:
        with without_launch():
            run = start(mode)
    except UsageError as error:
        raise ValueError(f"expected a project of W&B in logging.project, got {project!r}: {error}") from error
    except CommError as error:
        if mode != "online" or wandb.run is not None:
            raise
        _log.warning("W&B: offline, because the server was reached but did not answer: %s", error)
        wandb.teardown()  # its background process would refuse the same run id a second time
        run = start("offline")
    # Lightning defines these only for runs it starts itself: one axis for training curves, over all tasks.
    run.define_metric(_STEP_KEY)
    run.define_metric("*", step_metric=_STEP_KEY, step_sync=True)
    return WandbLogger(experiment=cast("Run", SteadyRun(run)), **logger_arguments)


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


def log_metrics(run: "Run", num_tasks: int, metrics: Mapping[str, float]) -> None:
    """Log figures against the number of tasks learned.

    Args:
        run: The run.
        num_tasks: Number of tasks learned.
        metrics: Numbers by name.
    """
    _log_on_tasks(run, num_tasks, metrics)


def log_pictures(run: "Run", pictures: "Mapping[str, Figure]", num_tasks: int) -> None:
    """Log Matplotlib figures as images; arguments as for :func:`log_metrics`."""
    import wandb

    _log_on_tasks(run, num_tasks, {name: wandb.Image(picture) for name, picture in pictures.items()})


def log_tables(run: "Run", results: Results) -> None:
    """Log the accuracy matrix of every model as a table with one row per entry."""
    import wandb

    tasks = results.task_labels()
    _log_on_tasks(
        run,
        results.num_finished,
        {
            f"{prefix}_matrix_table/{part_of_key(model)}": wandb.Table(
                columns=["after_task", "on_task", "task", "accuracy"],
                data=[
                    [row + 1, column + 1, tasks[column], None if math.isnan(accuracy) else accuracy]
                    for row, accuracies in enumerate(results.matrix(model, setting).tolist())
                    for column, accuracy in enumerate(accuracies)
                ],
            )
            for model in results.models
            for prefix, setting in PREFIXES.items()
        },
    )


def log_chart(run: "Run", results: Results) -> None:
    """Log the average accuracy of all models after every task as one chart; W&B's panels have one line per run."""
    import wandb

    averages = {model: results.figures(model, results.evaluation)["average_accuracy"] for model in results.models}
    chart = wandb.plot.line_series(
        xs=list(range(1, results.num_finished + 1)),
        ys=[[None if math.isnan(value) else value for value in values] for values in averages.values()],
        keys=list(averages),
        title="average accuracy",
        xname="tasks learned",
    )
    run.log({"cl/average_accuracy_chart": chart})


def log_classes(run: "Run", results: Results, deployed: str | None) -> None:
    """Log accuracies by class and confused classes of every model as tables, and the confusion matrix of one.

    Args:
        run: The run.
        results: Results of a finished run; nothing is logged of models whose answers were not counted by class.
        deployed: The model whose matrix W&B draws, if there are at most 100 classes.
    """
    import wandb

    names = results.class_names
    tables: dict[str, Any] = {}
    for model in results.models:
        for prefix, setting in PREFIXES.items():
            if (found := results.confusion(model, setting)) is None:
                continue
            key = part_of_key(model)
            known = zip(names, found.images, found.accuracies, strict=True)
            tables[f"{prefix}_class_accuracy_table/{key}"] = wandb.Table(
                columns=["class", "images", "accuracy"], data=[list(row) for row in known if row[1]]
            )
            if found.wrong is not None:
                answers: list[list[Any]] = [
                    [name, name, count] for name, count in zip(names, found.right, strict=True) if count
                ]
                answers += [[names[i], None if j is None else names[j], count] for i, j, count in found.wrong]
                tables[f"{prefix}_confusion_table/{key}"] = wandb.Table(
                    columns=["class", "taken_for", "images"], data=answers
                )
    if tables:
        _log_on_tasks(run, results.num_finished, tables)
    own = None if deployed is None else results.confusion(deployed)
    if own is not None and own.wrong is not None and len(names) <= _MOST_IN_MATRIX:
        matrix = own.matrix().tolist()
        cells = [[names[i], names[j], count] for i, row in enumerate(matrix) for j, count in enumerate(row)]
        fields = {name: name for name in ("Actual", "Predicted", "nPredictions")}  # as W&B's stored chart reads them
        title = {"title": f"{deployed}, {results.evaluation.replace('_', '-')}"}
        table = wandb.Table(columns=list(fields), data=cells)
        run.log({"cl/confusion_matrix": wandb.plot_table("wandb/confusion_matrix/v1", table, fields, title)})


def log_searches(run: "Run", searches: Sequence[Mapping[str, Any]]) -> None:
    """Log the validation scores of every hyper-parameter search as a table, and the chosen values as summary.

    Args:
        run: The run.
        searches: ``searches`` of a run's record in ``results.json`` (docs/compare.md).
    """
    import wandb

    for search in searches:
        columns = list(search["parameters"])
        rows = [[*(point["values"][name] for name in columns), point["score"]] for point in search["points"]]
        key = f"cl_search/{part_of_key(search['model'])}"
        run.log({key: wandb.Table(columns=[*columns, "validation_score"], data=rows)})
        summarise(run, {f"{key}/{name}": value for name, value in search["chosen"].items()})


def summarise(run: "Run", summary: Mapping[str, Any]) -> None:
    """Set the summary of a run, which a project's table of runs shows and sorts by."""
    run.summary.update(dict(summary))


def log_artifacts(run: "Run", folder: RunFolder, results: Results) -> None:
    """Log base, task vectors and merged models of a finished run, linked in this order.

    The base is named by its fingerprint and is one artifact for all runs of a project that start from it. Base and
    task vectors are declared as inputs of the run, so that the graph is base, experts, merged; the metadata of every
    merged model also lists its task vectors. Files are not copied: the folder of an offline run must stay in place
    until the run is synchronised.

    Args:
        run: The run.
        folder: The run folder.
        results: Results of the run.

    Raises:
        ValueError: If there are no task vectors.
    """
    import wandb

    bank = TaskVectorBank(folder.bank)
    base = bank.base
    if base is None:
        raise ValueError(
            f"expected task vectors in {bank.folder} to log as artifacts, got none; set learner.keep_task_vectors=true"
        )
    about = folder.logs / "base.json"
    write_json_atomic(about, {"fingerprint": base, "backbone": dict(run.config).get("backbone")})
    root = wandb.Artifact(f"base-{base[:12]}", "base", metadata={"fingerprint": base})
    root.add_file(str(about), policy="immutable")
    _log_input(run, root)
    experts = []
    for task in bank.tasks:
        experts.append(f"{run.id}-task-{task + 1:03d}")
        metadata = {**bank.metadata(task), "base": root.name, "fingerprint": base, "run": folder.path.name}
        expert = wandb.Artifact(experts[-1], "task-vector", metadata=metadata)
        expert.add_file(str(bank.path(task)), policy="immutable")
        _log_input(run, expert)
    for name in results.mergers:
        about_it: dict[str, Any] = {
            **load_metadata(folder.model(name)),
            "base": root.name,
            "task_vectors": experts,
            "run": folder.path.name,
            "average_accuracy": results.figures(name)["average_accuracy"][-1],
        }
        merged = wandb.Artifact(f"{run.id}-{_plain(name)}", "merged-model", metadata=about_it)
        merged.add_file(str(folder.model(name)), policy="immutable")
        run.log_artifact(merged)


def _log_input(run: "Run", artifact: "Artifact") -> None:
    """Log an artifact as an input of the run."""
    if not run.offline:
        run.use_artifact(artifact)
        return
    # use_artifact refuses to work offline, although its record for a new artifact, "use after commit", can wait in
    # the run's file like any other.
    run._log_artifact(artifact, is_user_created=True, use_after_commit=True)


def _plain(name: str) -> str:
    """Replace the characters that W&B does not allow in the names of artifacts."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def _log_on_tasks(run: "Run", num_tasks: int, values: Mapping[str, Any]) -> None:
    run.define_metric(TASK_KEY)
    for name in values:
        # An unescaped dot means a nested value, and labels such as "ties_density0.1" contain dots.
        run.define_metric(name.replace(".", "\\."), step_metric=TASK_KEY)
    run.log({TASK_KEY: num_tasks, **values})


def _choose_mode(online: bool) -> Literal["online", "offline", "disabled"]:
    """Choose whether a run is online, offline or disabled, and log the reason."""
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
    """Return whether the netrc file, which ``wandb login`` writes, has an entry for the server or W&B's public one."""
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
    """Return whether the server, or the proxy before it, accepts a connection within two seconds."""
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

    # In a thread, because the name look-up has no time-out and can take far longer than connecting.
    threading.Thread(target=connect, daemon=True).start()
    try:
        return answers.get(timeout=_CONNECT_SECONDS)
    except queue.Empty:
        return False
