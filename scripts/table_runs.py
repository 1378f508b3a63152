"""What the scripts that compare models over seeds share: running commands, and writing means with deviations."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


def clmerge(*arguments: str, log: Path) -> None:
    """Run a command with its output in a file, and stop where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    with log.open("w") as sink:
        done = subprocess.run([sys.executable, "-m", "clmerge", *arguments], stdout=sink, stderr=sink, env=environment)
    if done.returncode:
        raise SystemExit(f"clmerge {arguments[0]} failed: {log}")


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def spread(values: Sequence[float | None], *, factor: float = 100, digits: int = 1) -> str:
    """Return the mean over the seeds of what is defined, with the standard deviation of several; a dash for nothing."""
    kept = [value for value in values if value is not None]
    if not kept:
        return "-"
    mean = f"{factor * statistics.mean(kept):.{digits}f}"
    return mean + (f" ± {factor * statistics.stdev(kept):.{digits}f}" if len(kept) > 1 else "")
