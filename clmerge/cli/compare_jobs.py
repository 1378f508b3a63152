"""Compare several runs by jobs: each fills a folder with the rows of one run, which the comparison then takes over."""

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from clmerge.names import file_name, tell

if TYPE_CHECKING:
    from clmerge.runs.comparison.row_cache import RowCache
    from clmerge.runs.launching import Job, Launcher

# What a comparison of one run has no use for, or what is not in its rows.
_OF_ALL = {"--wandb", "--json", "--soup", "--diagnose"}


def words_for_run(words: Sequence[str], runs: Sequence[str], run: str) -> list[str]:
    """Return the command line of a comparison of several runs as that of one of them.

    Args:
        words: The command line, without the options of the launcher.
        runs: All runs, as they are named in it.
        run: One of the runs.

    Example:
        >>> words_for_run(["a", "b", "--mergers", "TIES", "--json"], ["a", "b"], "b")
        ['b', '--mergers', 'TIES']
    """
    size = len(runs)
    start = next(place for place in range(len(words)) if list(words[place : place + size]) == list(runs))
    kept = [*words[:start], run, *words[start + size :]]
    return [word for word in kept if word not in _OF_ALL]


def take_rows(
    cache: "RowCache", out: Path, words: Sequence[str], runs: Sequence[str], names: Sequence[str], launcher: "Launcher"
) -> None:
    """Evaluate every run by a job of its own, and add the rows to the cache of the comparison.

    The rows of a job have the bits that this process would compute: it computes what it does not find, from the same
    task vectors.

    Args:
        cache: The rows of the comparison.
        out: Its folder.
        words: Its command line, without the options of the launcher.
        runs: The run folders, as they are named in it.
        names: Names of the runs.
        launcher: Runs the jobs.

    Raises:
        RuntimeError: If a job failed; the message ends with the last lines of its output.
    """
    from clmerge.runs.comparison.row_cache import RowCache

    jobs = [_job(out, words_for_run(words, runs, run), name) for run, name in zip(runs, names, strict=True)]
    left = [job for job in jobs if not job.done]
    tell(f"comparing {len(left)} of {len(jobs)} runs by {type(launcher).__name__}")
    for number, (job, code) in enumerate(launcher.run(left), start=1):
        if code:
            raise RuntimeError(job.failure(code))
        tell(f"compared {job.name}: {number} of {len(left)}")
    for job in jobs:
        with closing(RowCache(Path(job.commit).with_name("rows.json"))) as found:
            cache.take(found)
    shutil.rmtree(out / "jobs")


def _job(out: Path, words: Sequence[str], name: str) -> "Job":
    import torch

    from clmerge.runs.launching import Job

    # Another comparison into the same folder is another job.
    asked = hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()[:8]
    folder = (out / "jobs" / f"{file_name(name)}-{asked}").resolve()
    return Job(
        name,
        (sys.executable, "-m", "clmerge", "compare", *words, f"--out={folder}"),
        log=f"{folder}.log",
        commit=str(folder / "results.json"),
        folder=str(Path.cwd()),
        variables=(("OMP_NUM_THREADS", str(torch.get_num_threads())),),  # sums depend on it
    )
