"""``clmerge fit --resume``: which run goes on, and what may change from here on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clmerge.names import tell

if TYPE_CHECKING:
    from clmerge.cli.signals import Stopped
    from clmerge.results.run_folder import RunFolder

# What may be another from one task to the next; everything else is what the run is.
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
    """Take ``--resume RUN`` out of the arguments; the rest are options as ``--name=value``.

    Args:
        arguments: The command line after ``fit``.

    Returns:
        The run folder, None where none is resumed, and the other arguments.

    Raises:
        SystemExit: If ``--resume`` names no folder, or stands beside an option that cannot change in a run.

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
        options: What ``split_resume`` returned.
        writes: Whether this process writes.

    Returns:
        The run, and those options that are new to it.

    Raises:
        FileNotFoundError: If there is no run, or a file of it is missing.
        ValueError: If a file of it was changed.
    """
    from clmerge.results.run_folder import RunFolder

    run = RunFolder.open(folder, writes=writes)
    if not run.config.is_file():
        raise FileNotFoundError(f"expected the configuration of a run of `clmerge fit` in {run.config}, got none")
    in_force = run.manifest.options_in_force()
    # Given twice, they are not another change; this is also how the other processes of a run come here.
    return run, [] if list(options) == in_force[len(in_force) - len(options) :] else list(options)


def record_changes(run: "RunFolder", changes: Sequence[str]) -> None:
    """Take down what holds from here on; a task that has begun without it begins anew, and a line says so.

    Args:
        run: The run.
        changes: Options as on the command line.
    """
    begin_anew = any(not option.startswith("--logging.") for option in changes)
    if run.change_options(changes, begin_anew=begin_anew) and run.writes:
        task = run.manifest.trained + 1
        tell(f"clmerge fit: task {task} starts again from its first epoch, since a task has one set of options")


def give_hint(stop: "Stopped", run: "RunFolder | None") -> None:
    """Tell a command that was stopped how it goes on."""
    if run is not None and run.path.is_dir() and not run.manifest.finished:
        stop.hint = f"resume with clmerge fit --resume {run.path}"


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
