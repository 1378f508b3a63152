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


def recorded_words(folder: str, options: Sequence[str]) -> list[str]:
    """Return the command line that repeats the configuration of a run, with options in force and new ones.

    Args:
        folder: The run folder.
        options: The options that ``split_resume`` returned.

    Raises:
        FileNotFoundError: If there is no run of ``clmerge fit``.
        ValueError: If its manifest is damaged.
    """
    from clmerge.results.run_folder import RunFolder
    from clmerge.results.run_manifest import read_manifest
    from clmerge.weights.checksums import MANIFEST

    run = RunFolder(folder, writes=False)
    manifest = read_manifest(run.path / MANIFEST)
    if not run.config.is_file():
        raise FileNotFoundError(f"expected the configuration of a run of `clmerge fit` in {run.config}, got none")
    return ["--config", str(run.config), *manifest.options_in_force(), *_new(options, manifest.options_in_force())]


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
    return run, _new(options, run.manifest.options_in_force())


def find_run(folder: str, config: str) -> str | None:
    """Return the folder of a run that ``--auto_resume`` continues, None if it holds none that has trained anything.

    Args:
        folder: The folder that ``--run_dir`` names.
        config: Text of the configuration of the command.

    Raises:
        ValueError: If the run there has another configuration; the message shows the first line that differs.
    """
    from clmerge.results.run_folder import RunFolder
    from clmerge.results.run_manifest import first_difference, read_manifest
    from clmerge.weights.checksums import MANIFEST

    run = RunFolder(folder, writes=False)
    if not (run.path / MANIFEST).is_file():
        return None
    run.manifest = read_manifest(run.path / MANIFEST)
    if run.is_untrained:
        return None
    if run.manifest.config != config:
        before, now = first_difference(run.manifest.config, config)
        raise ValueError(
            f"expected the configuration with which {folder} began, for --auto_resume, got {now!r} where it had "
            f"{before!r}: name another folder with --run_dir, or repeat the first command"
        )
    return folder


def _new(options: Sequence[str], in_force: Sequence[str]) -> list[str]:
    """Return the options unless they are in force: the other processes of a run get here with the same options."""
    return [] if list(options) == list(in_force[len(in_force) - len(options) :]) else list(options)


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
