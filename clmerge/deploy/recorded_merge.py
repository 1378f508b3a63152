"""A running merge with the fingerprints of its task vectors, which tell which of two states is the later one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cached_property
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from typing_extensions import override

from clmerge.deploy.running_merge import RunningMerge
from clmerge.merging import Statistics
from clmerge.weights import State, fingerprint


class RecordedMerge(RunningMerge):
    """Keep the fingerprint of every task vector that was merged, in order; arguments are those of ``RunningMerge``."""

    @cached_property
    def vectors(self) -> list[str]:
        """Fingerprints of the task vectors, in order."""
        return []

    @override
    def fold(
        self,
        tau: Mapping[str, Tensor],
        model: LightningModule,
        *,
        task: int | None = None,
        given: Statistics | None = None,
        store: Callable[[State], None] | None = None,
    ) -> None:
        super().fold(tau, model, task=task, given=given, store=store)
        self.vectors.append(fingerprint(tau))

    @override
    def accumulators(self) -> dict[str, Any]:
        return super().accumulators() | {"vectors": list(self.vectors)}

    @override
    def load_accumulators(self, state: Mapping[str, Any]) -> None:
        super().load_accumulators(state)
        self.vectors = _vectors_of(state)

    def as_of(self, state: Mapping[str, Any]) -> RunningMerge:
        """Return another merge with this one's mergers and options, and a state from ``accumulators``."""
        merge = RunningMerge(
            deepcopy(self.mergers),
            deploy=self.deploy,
            base=self.base or None,
            buffers=self.buffers,
            device=self.device,
            score=self.score,
            statistics=self.statistics,
            bank=self.bank,
        )
        merge.load_accumulators(state)
        return merge

    def go_on_from(self, state: Mapping[str, Any]) -> bool:
        """Load a state, unless more tasks have been merged here since; a merged task is never lost.

        Args:
            state: A state from ``accumulators``, of this or another process.

        Returns:
            Whether it was loaded. If not, it is an earlier state of this merge.

        Raises:
            RuntimeError: If neither state is an earlier one of the other, or as for ``load_accumulators``.
        """
        found = _vectors_of(state)
        if found[: self.num_tasks] == self.vectors:
            self.load_accumulators(state)
            return True
        if self.vectors[: len(found)] == found and state["base_fingerprint"] in (None, self.base_fingerprint):
            return False
        raise RuntimeError(
            f"expected a checkpoint of this stream, of which {self.num_tasks} tasks are merged here, got one with "
            f"{len(found)} tasks of another: taking it over would lose merges; use a new MergeCallback for another "
            "stream, or load the weights of the checkpoint alone"
        )


def _vectors_of(state: Mapping[str, Any]) -> list[str]:
    # States of clmerge versions without fingerprints hold only the number of tasks.
    return list(state.get("vectors", ["unknown"] * int(state["num_tasks"])))
