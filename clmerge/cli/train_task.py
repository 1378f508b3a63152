"""The job that trains one task of a run: ``python -m clmerge.cli.train_task RUN TASK``."""

import sys
from typing import Any


def train_task(folder: str, task: int) -> int:
    """Train one task of a run in a folder of its own; return the exit code.

    Args:
        folder: Folder of the run.
        task: Index of the task.
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
        mine = whole.job(task)
        there = (mine / MANIFEST).is_file()
        run = (RunFolder.open if there else RunFolder.create)(mine, writes=processes.writes)
        processes.publish(run.path)
        loggers: list[Any] = [CSVLogger(whole.logs, name=f"task_{task:03d}")] if config.logging.csv else []
        learner.train_apart(run, task, trainer=build, loggers=loggers)
    except Exception as error:
        say(f"fit, task {task + 1}", error)
        return 1
    return 0


if __name__ == "__main__":
    from clmerge.cli.parent import follow_parent
    from clmerge.cli.signals import run_until_stopped

    follow_parent()
    sys.exit(run_until_stopped("fit", lambda: train_task(sys.argv[1], int(sys.argv[2]))))
