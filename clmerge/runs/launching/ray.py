"""Run jobs on a cluster of Ray, or on a Ray of this machine alone."""

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from typing_extensions import override

from clmerge.runs.launching.job import Job, Processes
from clmerge.runs.launching.launcher import Launcher

_STORE = 80 * 2**20  # bytes of Ray's object store: jobs give it an exit code


class RayLauncher(Launcher):
    """Runs jobs on a cluster of Ray (``pip install clmerge[ray]``), which moves those of a lost machine to another.

    All machines see the folder of the run under one path, and have clmerge installed. Ray's report of usage is off.

    Args:
        jobs: How many jobs run at a time, where no cluster is named.
        retries: How often a job is started again that a signal or a lost machine ended.
        address: Address of a cluster, ``auto`` for the one of this machine. Default: a Ray of this machine alone, which
            ends with the command.
        cpus: Cores of a job.
        gpus: GPUs of a job, of which it sees no others.
    """

    def __init__(
        self, jobs: int = 2, retries: int = 3, address: str | None = None, cpus: float = 1.0, gpus: float = 0.0
    ) -> None:
        super().__init__(jobs, retries)
        self.address = address
        self.cpus = cpus
        self.gpus = gpus
        self._connected = False

    @override
    @contextmanager
    def session(self) -> Iterator[None]:
        if self._connected:
            yield
            return
        ray = _imported()
        self._connect(ray)
        self._connected = True
        try:
            yield
        finally:
            self._connected = False
            ray.shutdown()

    @override
    def run(self, jobs: Sequence[Job]) -> Generator[tuple[Job, int]]:
        ray = _imported()
        with self.session():
            start = ray.remote(max_retries=self.retries, num_cpus=self.cpus, num_gpus=self.gpus)(run_on_worker)
            left = {start.remote(job, self.retries): job for job in jobs}
            try:
                while left:
                    (ready, *_), _ = ray.wait([*left], num_returns=1)
                    job = left.pop(ready)
                    try:
                        code = int(ray.get(ready))
                    except ray.exceptions.RayError as error:
                        reason = " ".join(str(error).split())[:300]
                        raise RuntimeError(f"expected Ray to run {job.name}, got {reason}") from error
                    yield job, code
            finally:
                for reference in left:
                    ray.cancel(reference, force=True)

    def _connect(self, ray: Any) -> None:
        options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
        if self.address is None:
            own = {"num_cpus": max(1, round(self.jobs * self.cpus)), "object_store_memory": _STORE}
            options |= own | {"_node_ip_address": "127.0.0.1"}
        else:
            options = {"address": self.address, "log_to_driver": False}
        for last in (False, True):  # on a busy machine the first start may exceed a time limit of Ray's
            try:
                ray.init(**options)
                return
            except (RuntimeError, ConnectionError, TimeoutError) as error:
                ray.shutdown()
                if last:
                    where = f"the cluster {self.address}" if self.address else "a Ray of this machine"
                    raise RuntimeError(f"expected {where} to start jobs on, got {error}") from error


def run_on_worker(job: Job, retries: int) -> int:
    """Run a job in a worker of Ray; return its exit code."""
    return Processes().repeat(job, retries)


def _imported() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # not 15, by which jobs would get no time beside other programs
    try:
        return import_module("ray")
    except ImportError as error:
        raise ValueError(
            f"expected Ray for the launcher, got {error}: pip install 'clmerge[ray]', or use --launcher=local"
        ) from error
