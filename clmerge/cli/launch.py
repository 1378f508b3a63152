"""The options of launchers, and the jobs that they get."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clmerge.results.run_folder import RunFolder
    from clmerge.runs.launching import Job, Launcher
    from clmerge.runs.launching.branch_jobs import BranchJobs
    from clmerge.runs.launching.spread import Spread
    from clmerge.runs.launching.task_jobs import TaskJobs
    from clmerge.runs.learner import Learner

_NAMES = {"local": "LocalLauncher", "ray": "RayLauncher"}


def name_launchers(argv: Sequence[str]) -> list[str]:
    """Rewrite ``--launcher local`` and ``--launcher=ray`` with the names of the classes.

    Example:
        >>> name_launchers(["--seed=1", "--launcher", "local"])
        ['--seed=1', '--launcher=LocalLauncher']
    """
    found: list[str] = []
    words = iter(argv)
    for word in words:
        name, given, value = word.partition("=")
        if name == "--launcher":
            value = value if given else next(words, "")
            word = f"{name}={_NAMES.get(value, value)}"
        found.append(word)
    return found


def split_launcher(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the options of the launcher, which change how a run is computed but not what it is, from the others.

    Example:
        >>> split_launcher(["--launcher=LocalLauncher", "--seed", "1", "--launcher.jobs", "2"])
        (['--launcher=LocalLauncher', '--launcher.jobs=2'], ['--seed', '1'])
    """
    mine: list[str] = []
    others: list[str] = []
    words = iter(argv)
    for word in words:
        name, given, value = word.partition("=")
        if (name != "--launcher" and not name.startswith("--launcher.")) or name == "--launcher.help":
            others.append(word)
        else:
            mine.append(f"{name}={value if given else next(words, '')}")
    return mine, others


def build_launcher(options: Any) -> "Launcher | None":
    """Return the launcher of a parsed configuration, None without one."""
    from clmerge.cli.parser import CommandParser
    from clmerge.runs.launching import Launcher

    if options is None:
        return None
    parser = CommandParser(exit_on_error=False)
    parser.add_subclass_arguments(Launcher, "launcher")
    found: Launcher = parser.instantiate(parser.parse_object({"launcher": options.as_dict()})).launcher
    return found


def jobs_of(run: "RunFolder", launcher: "Launcher", learner: "Learner", spread: "Spread") -> "TaskJobs | BranchJobs":
    """Return the jobs that train the tasks of a run, or their branches.

    Args:
        run: The run folder; its configuration is what the jobs train by.
        launcher: Runs the jobs.
        learner: The learner.
        spread: What the jobs train.
    """
    import torch

    from clmerge.runs.branching import branch_label
    from clmerge.runs.launching import Job
    from clmerge.runs.launching.branch_jobs import BranchJobs
    from clmerge.runs.launching.task_jobs import TaskJobs
    from clmerge.runs.launching.trained import FILE

    path = run.path.resolve()
    threads = (("OMP_NUM_THREADS", str(torch.get_num_threads())),)  # sums depend on it
    sizes = {"branches": len(learner.participants(0, 0)), "rounds": learner.rounds}

    def job(task: int, branch: int | None = None) -> "Job":
        folder = run.job(task, branch).resolve()
        more, label = ((), "") if branch is None else ((str(branch),), branch_label(branch, **sizes))
        return Job(
            f"task {task + 1}{label}",
            (sys.executable, "-m", "clmerge.cli.train_task", str(path), str(task), *more),
            log=f"{folder}.log",
            commit=str(folder / FILE),
            folder=str(Path.cwd()),
            variables=threads,
        )

    return TaskJobs(launcher, job) if spread == "tasks" else BranchJobs(run, launcher, job)
