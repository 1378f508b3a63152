"""Write the page of a report again whenever one of its runs has gone on."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from clmerge.names import duration, tell
from clmerge.report import read_study, write_report
from clmerge.report.runs import NothingEvaluatedError
from clmerge.report.study import Study
from clmerge.results.results import Setting

INTERVAL = 2.0  # seconds between two looks at the files


def watch(
    runs: Sequence[str],
    out: str,
    *,
    evaluation: Setting | None,
    title: str | None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Write the page after every evaluated task, until all runs are complete.

    A run that is still to begin, or has evaluated nothing yet, is waited for. While a run goes on, the page reloads
    itself and says about how long it will take.

    Args:
        runs: The run folders.
        out: The page.
        evaluation: The reading of the logits to show first.
        title: Heading of the page.
        sleep: Waits for a number of seconds.

    Raises:
        ValueError: If a file is damaged, or the runs do not match.
    """
    seen: tuple[int, ...] | None = None
    told = ""
    while True:
        now = tuple(_changed(Path(run)) for run in runs)
        if now != seen:
            seen = now
            try:
                study = read_study(runs, evaluation=evaluation)
            except (FileNotFoundError, NothingEvaluatedError) as error:
                if str(error) != told:
                    tell(f"clmerge report: waiting: {error}")
                    told = str(error)
            except ValueError:
                if tuple(_changed(Path(run)) for run in runs) == now:
                    raise  # else it was read between two files of one commit
            else:
                finished = all(run.is_finished for run in study.runs)
                write_report(study, out, title=title, left=None if finished else time_left(study))
                tell(f"page      {out}: after task {study.num_finished} of {len(study.tasks)}")
                if finished:
                    return
        sleep(INTERVAL)


def time_left(study: Study) -> str:
    """Return how long the slowest run will take at its pace so far, as text.

    Args:
        study: Runs of which some are not finished.
    """
    seconds = 0.0
    for run in study.runs:
        done, total = run.results.num_finished, run.results.num_tasks
        seconds = max(seconds, (total - done) * sum(run.results.seconds.values()) / max(done, 1))
    return f"about {duration(seconds)} left"


def _changed(run: Path) -> int:
    """Return when the results and the manifest of a run last changed; 0 if there are none."""
    found = 0
    for name in ("results.json", "manifest.json"):
        try:
            found = max(found, (run / name).stat().st_mtime_ns)
        except FileNotFoundError:
            continue
    return found
