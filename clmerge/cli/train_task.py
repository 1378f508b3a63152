"""The job that trains a task of a run, or a branch: ``python -m clmerge.cli.train_task RUN TASK [BRANCH]``."""

import sys
from typing import Any


def train_task(folder: str, task: int, branch: int | None = None) -> int:
    """Train one task of a run, or a branch of it, in a folder of its own; return the exit code.

    Args:
        folder: Folder of the run.
        task: Index of the task.
        branch: Number of the task's fits before this one; default the whole task is trained.
    """
    from lightning.pytorch.loggers import CSVLogger

    from clmerge.cli.failures import say
    from clmerge.cli.fit import build_parser, build_run, trainer_factory
    from clmerge.cli.preflight import check_run
    from clmerge.cli.ranks import find_processes
    from clmerge.cli.resume import recorded_words
    from clmerge.results.run_folder import RunFolder
    from clmerge.weights.checksums import MANIFEST

    try:
        whole = RunFolder(folder, writes=False)
        config = build_parser().parse_args([*recorded_words(folder, []), "--trainer.enable_progress_bar=false"])
        build = trainer_factory(config)
        processes = find_processes(build, folder)
        learner, _, _ = build_run(build_parser(), config, whole.path, tells=False)
        check_run(learner, build)
        mine = whole.job(task, branch)
        there = (mine / MANIFEST).is_file()
        run = (RunFolder.open if there else RunFolder.create)(mine, writes=processes.writes)
        processes.publish(run.path)
        loggers: list[Any] = [CSVLogger(whole.logs, name=mine.name)] if config.logging.csv else []
        learner.train_apart(run, task, branch=branch, whole=whole, trainer=build, loggers=loggers)
    except Exception as error:
        say(f"fit, task {task + 1}{'' if branch is None else f', fit {branch + 1}'}", error)
        return 1
    return 0


if __name__ == "__main__":
    from clmerge.cli.parent import follow_parent
    from clmerge.cli.signals import run_until_stopped

    follow_parent()
    numbers = [int(word) for word in sys.argv[2:]]
    sys.exit(run_until_stopped("fit", lambda: train_task(sys.argv[1], *numbers)))
