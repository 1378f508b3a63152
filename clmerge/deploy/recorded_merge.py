"""A running merge with the fingerprints of its task vectors, which tell which of two states is the later one."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import cached_property
from typing import Any

from lightning.pytorch import LightningModule
from typing_extensions import override

from clmerge.deploy.forgetting import all_without
from clmerge.deploy.running_merge import RunningMerge
from clmerge.merging import Statistics
from clmerge.merging.state import listed
from clmerge.weights import BankVector, CheckedVector, State


class RecordedMerge(RunningMerge):
    """Keep the fingerprint of every task vector that was merged, in order; arguments are those of ``RunningMerge``."""

    @cached_property
    def vectors(self) -> list[str]:
        """Fingerprints of the task vectors, in order."""
        return []

    @override
    def _folded(self, tau: CheckedVector) -> None:
        self.vectors.append(tau.sha256)

    @cached_property
    def forgotten(self) -> list[int]:
        """Indices of the tasks that were taken out again."""
        return []

    def forget(
        self,
        task: int,
        model: LightningModule | None = None,
        *,
        vector: State | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        """Take a task out of every merger, or out of none; merged models are those of the other tasks from now on.

        A merger that needs task vectors alone is merged anew where those of the other tasks are in the bank: to the
        bit what it had been without the task. From another the task is subtracted, if it is ``removable``, to the bound
        on rounding that its ``downdate`` keeps. The other tasks keep their indices, and this one is not given again.
        The file in the bank stays, and so does what the model has in its training weights.

        Args:
            task: Index of the task, from 0.
            model: The fitted LightningModule, for ``buffers="re-estimated"``.
            vector: The task's vector. Default: that in the bank.
            statistics: What the mergers' ``requires`` were given beside it; theta_0 is known.

        Raises:
            ValueError: If a merger can do neither, by the names of all such mergers; nothing is changed then.
            RuntimeError: If merged weights are in the model, or the running statistics are a mean over the tasks.
        """
        if self._inside is not None:
            raise RuntimeError("expected to forget outside of merge.merged(model), got a call within the block")
        if self.buffers == "mean":
            raise RuntimeError(
                "expected running statistics that a task can be taken out of, got buffers='mean', their mean over the "
                "tasks; merge the other tasks anew"
            )
        if self.buffers == "re-estimated" and model is None:
            raise ValueError("expected the model to estimate its running statistics again, got none; pass model=")

        def read(other: int) -> State:
            if other == task and vector is not None:
                return vector
            assert self.bank is not None, "what is known is given or stored"
            stored = CheckedVector({name: tau.to(self.base[name].device) for name, tau in self.bank[other].items()})
            stored.stored = BankVector(self.bank, other)
            return stored

        without = all_without(
            self.mergers,
            task,
            known={*(() if self.bank is None else self.bank.tasks), *(() if vector is None else (task,))},
            read=read,
            base=self.base_fingerprint,
            statistics={"weights": self.base} | dict(statistics or {}),
        )
        for name, merger in without.items():
            self.mergers[name].load_state_dict(merger.state_dict())
        self.forgotten.append(task)
        if model is not None:
            self._estimate_all(model)

    @override
    def accumulators(self) -> dict[str, Any]:
        return super().accumulators() | {"vectors": list(self.vectors), "forgotten": list(self.forgotten)}

    @override
    def load_accumulators(self, state: Mapping[str, Any]) -> None:
        super().load_accumulators(state)
        self.vectors = _vectors_of(state)
        self.forgotten = list(state.get("forgotten", []))

    def as_of(self, state: Mapping[str, Any]) -> RunningMerge:
        """Return another merge with this one's mergers and options, and a state from ``accumulators``."""
        merge = RunningMerge(
            deepcopy(self.mergers),
            deploy=self.deploy,
            base=self.base or None,
            buffers=self.buffers,
            device=self.device,
            score=self.score,
            losses=self.losses,
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
        if back := sorted({*self.forgotten} - {*state.get("forgotten", [])}):
            if len(found) > self.num_tasks:
                raise RuntimeError(
                    f"expected a checkpoint without {listed(back)}, which this callback has forgotten, got one that "
                    "has more tasks and these, too; forget them there, and resume from a later checkpoint"
                )
            return False
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
