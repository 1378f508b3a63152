"""``clmerge fit --resume``: open the run to resume, and record options that change from the next task on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clmerge.names import tell

if TYPE_CHECKING:
    from clmerge.cli.signals import Stopped
    from clmerge.results.run_folder import RunFolder

# Options that may change between tasks; all others are fixed for a run.
CHANGEABLE = (
    "--trainer.",
    "--data.",
    "--logging.",
    "--model.optimizer",
    "--model.schedule",
    "--model.warmup_steps",
    "--model.label_smoothing",
)


def split_resume(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Separate ``--resume RUN`` from the other arguments, which are returned as ``--name=value``.

    Args:
        arguments: The command line after ``fit``.

    Returns:
        The run folder, None without ``--resume``, and the other arguments.

    Raises:
        SystemExit: If ``--resume`` names no folder, or is given with an option that cannot change in a run.

    Example:
        >>> split_resume(["--resume", "runs/a", "--trainer.max_epochs", "3"])
        ('runs/a', ['--trainer.max_epochs=3'])
    """
    folder: str | None = None
    rest: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == "--resume" or argument.startswith("--resume="):
            folder = argument.partition("=")[2]
            if not folder and "=" not in argument:
                position += 1
                folder = arguments[position] if position < len(arguments) else ""
        else:
            rest.append(argument)
        position += 1
    if folder is None:
        return None, list(arguments)
    if not folder or folder.startswith("--"):
        _refuse("expected --resume RUN, got no folder")
    options = _joined(rest)
    for option in options:
        if not option.startswith(CHANGEABLE) or "=" not in option:
            _refuse(
                f"expected options of --trainer, --data, --logging or the optimizer beside --resume, got {option}: the "
                "rest of a run's configuration is what the run is, and its folder holds it; begin a new run"
            )
    return folder, options


def open_run(folder: str, options: Sequence[str], *, writes: bool) -> "tuple[RunFolder, list[str]]":
    """Open the run to resume.

    Args:
        folder: The run folder.
        options: The options that ``split_resume`` returned.
        writes: Whether this process writes.

    Returns:
        The run, and the options that differ from those in force.

    Raises:
        FileNotFoundError: If there is no run, or one of its files is missing.
        ValueError: If one of its files was changed.
    """
    from clmerge.results.run_folder import RunFolder

    run = RunFolder.open(folder, writes=writes)
    if not run.config.is_file():
        raise FileNotFoundError(f"expected the configuration of a run of `clmerge fit` in {run.config}, got none")
    in_force = run.manifest.options_in_force()
    # Options already in force are no change; the other processes of a run also get here with the same options.
    return run, [] if list(options) == in_force[len(in_force) - len(options) :] else list(options)


def complete_line(folder: str) -> str | None:
    """Return that a run is complete, without importing Lightning; None if there is anything left to do or to report.

    Args:
        folder: The run folder.
    """
    from clmerge.bounded_yaml import load_yaml
    from clmerge.figures import plot_files
    from clmerge.names import file_name
    from clmerge.results.results import Results
    from clmerge.results.run_manifest import check_config, read_manifest
    from clmerge.weights.checksums import MANIFEST, verify_files

    path = Path(folder)
    try:
        manifest = read_manifest(path / MANIFEST)
        if not manifest.finished:
            return None
        verify_files(path, manifest.files)
        check_config(path / "config.yaml", manifest.config)
        options = (load_yaml(manifest.config, MANIFEST) or {}).get("logging") or {}
        results = Results.from_dict(manifest.results)
    except (OSError, ValueError):
        return None  # opening the run says why
    models = [path / "model" / f"{file_name(name)}.safetensors" for name in results.mergers]
    views = [path / "results.json", *models, *plot_files(results, path / "plots")]
    if options.get("artifacts") or not all(file.is_file() for file in views):
        return None
    return f"{folder} is complete: {len(results.tasks)} of {len(results.tasks)} tasks; its results are in {views[0]}"


def record_changes(run: "RunFolder", changes: Sequence[str]) -> None:
    """Record options for the tasks to come; a task that was begun without them restarts, and a message says so.

    Args:
        run: The run.
        changes: Options as on the command line.
    """
    begin_anew = any(not option.startswith("--logging.") for option in changes)
    if run.change_options(changes, begin_anew=begin_anew) and run.writes:
        task = run.manifest.trained + 1
        tell(f"clmerge fit: task {task} starts again from its first epoch, since a task has one set of options")


def give_hint(stop: "Stopped", run: "RunFolder | None") -> None:
    """Add to the message of a stopped command where the run stands and how to resume it."""
    if run is not None and run.path.is_dir() and not run.manifest.finished:
        tasks = len(run.manifest.stream.get("tasks", ()))
        done = f"{run.manifest.trained} of {tasks} tasks are trained and merged; " if tasks else ""
        stop.hint = f"{done}resume with clmerge fit --resume {run.path}"


def _joined(arguments: Sequence[str]) -> list[str]:
    """Write ``--name value`` as ``--name=value``."""
    found: list[str] = []
    for argument in arguments:
        if found and "=" not in found[-1] and not argument.startswith("--"):
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found


def _refuse(message: str) -> None:
    tell(f"clmerge fit: {message}")
    raise SystemExit(2)
