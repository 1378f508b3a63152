"""Write the numbers of single tasks beside Lightning's CSV log, one line each.

Lightning's file has a column for every name: with one for every task, each line of a long stream would be as wide as
the stream, and the whole file would be read and written again whenever a task is new.
"""

import csv
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Final
from weakref import WeakSet

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import CSVLogger

from clmerge.loggers.metrics import TASK_KEY

TASKS: Final = "tasks.csv"
_begun: "WeakSet[CSVLogger]" = WeakSet()  # others may find the file of an earlier run, as they do Lightning's


def write_tasks(logger: CSVLogger, metrics: Mapping[str, float], num_tasks: int) -> None:
    """Write metrics as lines ``cl/task,metric,value`` to the end of ``tasks.csv`` in the logger's folder.

    Args:
        logger: The logger; the first call with it begins the file anew.
        metrics: Numbers by name.
        num_tasks: Number of tasks learned.
    """
    folder = logger.log_dir
    files = get_filesystem(folder)
    files.makedirs(folder, exist_ok=True)
    with files.open(str(PurePosixPath(folder) / TASKS), "a" if logger in _begun else "w", newline="") as file:
        writer = csv.writer(file)
        if logger not in _begun:
            writer.writerow([TASK_KEY, "metric", "value"])
        writer.writerows([num_tasks, name, value] for name, value in metrics.items())
    _begun.add(logger)
