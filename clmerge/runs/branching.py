"""Train one task in branches: several fits from one start, each on a part of the data, merged after every round."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from clmerge.callbacks import MergeCallback
from clmerge.merging import Merger, Statistics
from clmerge.streams.splits import derived_seed
from clmerge.weights import TaskVector
from clmerge.weights.parametrization import own_names, renew, running_statistics
from clmerge.weights.swap import assign, full_copy, named_tensors, own_tensors

Reference: TypeAlias = Literal["start", "base"]


class BranchedTask:
    """The fits of one task: in each of ``rounds`` rounds, ``branches`` models are trained from one start and merged.

    The vector of a branch is its weights minus the start; the merged vector is added to the start, which begins the
    next round (Branch-and-Merge, arXiv 2407.08699; repeated, ColD Fusion, arXiv 2212.01378). With ``reference="base"``
    it is the weights minus theta_0, and the merged vector is added to that (Model Stock in rounds, arXiv 2403.19522).
    What is trained but not merged, such as a head, and running statistics start alike, too, and are averaged over the
    branches. So the branches of a round do not depend on each other.

    Args:
        merge: The callback that holds theta_0 and selects the merged parameters.
        module: The model, with the weights that the task starts from.
        merger: Merges the branches of a round; it is reset before every round.
        branches: Branches per round.
        rounds: Rounds of the task.
        seed: Seed of the initial factors of low-rank tuning modes.
        reference: What branch vectors are measured from: the ``start`` of the round, or the ``base``.
        starts: Vectors from theta_0 at which the branches of the first round start instead, one after another (Model
            Ratatouille, arXiv 2212.10445); default the module's weights.

    Attributes:
        done: Number of finished fits, over all rounds.
    """

    def __init__(
        self,
        merge: MergeCallback,
        module: LightningModule,
        merger: Merger,
        *,
        branches: int,
        rounds: int,
        seed: int,
        reference: Reference = "start",
        starts: Sequence[TaskVector] = (),
    ) -> None:
        self.merge = merge
        self.module = module
        self.merger = merger
        self.branches = branches
        self.rounds = rounds
        self.seed = seed
        self.reference = reference
        self.starts = list(starts)
        self.done = 0
        merger.reset()
        merge.take_base(module)
        self._start: TaskVector = merge.task_vector(module)
        self._rest_start = {name: full_copy(tensor, torch.device("cpu")) for name, tensor in self._rest().items()}
        self._rest_sum = {name: torch.zeros_like(tensor) for name, tensor in self._rest_start.items()}

    @property
    def finished(self) -> bool:
        """Whether all rounds are done; the model then holds the merge of the last one."""
        return self.done == self.branches * self.rounds

    def begin(self) -> None:
        """Load the start of the branch into the model; a checkpoint of the branch may replace it."""
        others = self.starts if self.done < self.branches else []
        self._place(others[self.done % len(others)] if others else self._start, self._rest_start)
        renew(self.module, seed=derived_seed(self.seed, "branch", self.done), task=self.merge.task)

    def end(self, statistics: Statistics) -> None:
        """Fold the trained branch into the merger; after the last branch of a round, load the merge into the model.

        Args:
            statistics: ``samples``, ``steps`` and whatever else the merger requires, measured on the branch's images.

        Raises:
            ValueError: If the weights hold NaN or Inf.
        """
        theta = self.merge.task_vector(self.module)
        origin = self._origin(theta)
        self.merger.update(
            {name: tensor - origin[name] for name, tensor in theta.items()},
            task=self.done,
            statistics=statistics,
            score=self._scorer(origin) if self.merger.requires_score else None,
        )
        for name, tensor in self._rest().items():
            self._rest_sum[name] += tensor.detach().cpu()
        self.done += 1
        if self.done % self.branches == 0:
            merged = self.merger.compute()
            self._start = {name: tensor + merged[name].to(tensor) for name, tensor in origin.items()}
            self._rest_start = {name: _mean(total, self.branches) for name, total in self._rest_sum.items()}
            self._rest_sum = {name: torch.zeros_like(total) for name, total in self._rest_sum.items()}
            self.merger.reset()
            self._place(self._start, self._rest_start)

    def vector(self) -> TaskVector:
        """Return the task vector of the whole task: the last merge minus theta_0."""
        return dict(self._start)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs: tensors and primitives."""
        return {
            "done": self.done,
            "start": self._start,
            "rest_start": self._rest_start,
            "rest_sum": self._rest_sum,
            "merger": self.merger.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.merger.load_state_dict(state["merger"])
        self.done = int(state["done"])
        self._rest_sum = dict(state["rest_sum"])
        self.enter(state["start"], state["rest_start"], self.done)
        self._place(self._start, self._rest_start)

    @property
    def start(self) -> tuple[TaskVector, dict[str, Tensor]]:
        """Where the round starts: the vector from theta_0, and what is trained but not merged."""
        return self._start, self._rest_start

    def enter(self, start: TaskVector, rest: Mapping[str, Tensor], done: int) -> None:
        """Take over the start of a round that another process has begun.

        Args:
            start: The vector from theta_0.
            rest: What is trained but not merged.
            done: Number of fits before the one that :meth:`begin` begins.
        """
        self.done = done
        self._start = {name: tensor.to(self.merge.base[name].device) for name, tensor in start.items()}
        self._rest_start = dict(rest)

    def _origin(self, theta: TaskVector) -> TaskVector:
        """Return what branch vectors are measured from, as a vector from theta_0."""
        if self.reference == "start":
            return self._start
        return {name: torch.zeros_like(tensor) for name, tensor in theta.items()}

    def _scorer(self, origin: TaskVector) -> Callable[[Mapping[str, Tensor]], float]:
        score = self.merge.scorer(self.module)
        return lambda moved: score({name: tensor + moved[name].to(tensor) for name, tensor in origin.items()})

    def _place(self, vector: TaskVector, rest: Mapping[str, Tensor]) -> None:
        values = {**self.merge.weights_with(vector, self.module), **rest}
        assign(named_tensors(self.module, values, origin="the start of a branch"), values)

    def _rest(self) -> dict[str, Tensor]:
        """Return what training moves but is not merged, running statistics included, by the module's own names."""
        own, tensors = own_names(self.module), own_tensors(self.module)
        statistics = running_statistics(self.module, counts=True)
        return {
            name: tensors[name]
            for dense, name in own.items()
            if dense in statistics or (dense not in self.merge.base and tensors[name].requires_grad)
        }


def _mean(total: Tensor, number: int) -> Tensor:
    return total / number if total.is_floating_point() else total // number  # counts of batches


def branch_label(done: int, *, branches: int, rounds: int) -> str:
    """Describe the fit that comes after ``done`` fits of a task.

    Example:
        >>> branch_label(3, branches=2, rounds=2)
        ', round 2/2, branch 2/2'
    """
    round_label = f", round {done // branches + 1}/{rounds}" if rounds > 1 else ""
    return f"{round_label}, branch {done % branches + 1}/{branches}"


def taking_part(branches: int, fraction: float) -> int:
    """Return how many branches train in a round, at least one.

    Example:
        >>> taking_part(10, 0.25), taking_part(4, 1.0)
        (2, 4)
    """
    return max(1, round(fraction * branches))


def uploads_of(branches: int, rounds: int, fraction: float) -> int:
    """Return how many models are sent to be merged for one task."""
    return taking_part(branches, fraction) * rounds if branches > 1 else 1
