"""Run jobs as processes of this machine."""

import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue

from typing_extensions import override

from clmerge.runs.launching.job import Job, Processes
from clmerge.runs.launching.launcher import Launcher


class LocalLauncher(Launcher):
    """Runs jobs as processes of this machine; where there are several GPUs, each job sees one of them.

    Args:
        jobs: How many jobs run at a time.
        retries: How often a job that a signal ended is started again.
    """

    def __init__(self, jobs: int = 2, retries: int = 3) -> None:
        super().__init__(jobs, retries)

    @override
    def run(self, jobs: Sequence[Job]) -> Generator[tuple[Job, int]]:
        processes = Processes()
        places: SimpleQueue[dict[str, str]] = SimpleQueue()
        devices = visible_devices()
        for place in range(self.jobs):
            places.put({"CUDA_VISIBLE_DEVICES": devices[place % len(devices)]} if len(devices) > 1 else {})

        def run(job: Job) -> int:
            place = places.get()
            try:
                return processes.repeat(job, self.retries, place)
            finally:
                places.put(place)

        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(run, job): job for job in jobs}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                processes.stop()
                for future in futures:
                    future.cancel()


def visible_devices() -> list[str]:
    """Return the GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]
