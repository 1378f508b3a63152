"""End a process with the one that started it as a job, so that no two of them write one folder."""

import os
import signal
import threading
import time

# As in clmerge.runs.launching.job, which imports more than a command needs to start.
PARENT_VARIABLE = "CLMERGE_PARENT"
_EVERY = 0.5  # seconds


def follow_parent() -> None:
    """If this process is a job, end it when the process that started it has ended, and wait for locks of such ones.

    A killed process cannot end its jobs. The job that takes the place of one waits until that has noticed.
    """
    named = os.environ.pop(PARENT_VARIABLE, None)
    if named is None:
        return
    from clmerge.results.run_lock import wait_for_locks

    parent = int(named)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_EVERY)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="clmerge-parent", daemon=True).start()
    wait_for_locks(60.0)
