"""Which of a run's processes this one is, before anything is written: only the first one writes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

# Lightning starts the other ranks of one machine with the same command; they read rank zero's folder from here.
RUN_DIR_VARIABLE = "CLMERGE_RUN_DIR"


def own_environment(options: Mapping[str, Any], plugins: Sequence[Any]) -> "list[ClusterEnvironment]":
    """Return the environment of a Trainer that SLURM's variables must not concern, as a list of plugins.

    A Trainer of one process on one node may run beside others in one SLURM step, whose number of processes Lightning
    would refuse.

    Args:
        options: Arguments of the Trainer by name.
        plugins: Its plugins; an environment among them is kept.
    """
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment

    devices = options.get("devices", "auto")
    alone = str(devices) == "1" or (devices == "auto" and options.get("accelerator") == "cpu")
    if not alone or options.get("num_nodes", 1) != 1 or "SLURM_NTASKS" not in os.environ:
        return []
    return [] if any(isinstance(one, ClusterEnvironment) for one in plugins) else [LightningEnvironment()]


@dataclass(frozen=True)
class Processes:
    """The place of this process among those of its run.

    Attributes:
        rank: Number of this process; the first one writes.
        count: Number of processes.
        folder: The run folder, as far as it is known; empty if the first process may choose it.
    """

    rank: int
    count: int
    folder: str

    @property
    def writes(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def publish(self, folder: Path) -> None:
        """Tell the processes that Lightning starts from this one which folder the run has."""
        if self.writes:
            os.environ[RUN_DIR_VARIABLE] = str(folder)


def find_processes(build: Any, folder: str | None) -> Processes:
    """Ask a Trainer which process this is: it knows torchrun, SLURM, and processes that Lightning started.

    Environment variables alone would not do: several independent runs in one SLURM step have different
    ``SLURM_PROCID``, and with ``NODE_RANK`` the rank depends on the devices of a node.

    Args:
        build: Builds the run's Trainers.
        folder: The folder that the command line names, if any.

    Raises:
        ValueError: If several processes were not given one run folder.
    """
    from lightning_utilities.core.rank_zero import rank_zero_only

    from clmerge.lightning_compat import quiet_lightning

    quiet_lightning()
    trainer = build(logger=False, callbacks=[], plugins=[], enable_model_summary=False)
    rank, count = trainer.global_rank, trainer.world_size
    rank_zero_only.rank = rank  # type: ignore[attr-defined]  # which Lightning takes from SLURM_PROCID, also where that is of another run
    if rank and folder is None:
        folder = os.environ.get(RUN_DIR_VARIABLE)
    if count > 1 and folder is None:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        started_outside = environment is not None and environment.creates_processes_externally
        if rank or started_outside or trainer.num_nodes > 1:
            raise ValueError(
                f"expected --run_dir, one folder for the {count} processes of this run, got none in process {rank}: "
                "each of them would choose its own; name a folder that all nodes see"
            )
    return Processes(rank, count, folder or "")
