"""Route images through experts around the models that are merged again, as ``fit`` does."""

import copy
from collections.abc import Mapping, Sequence

import torch

from clmerge.deploy.predictors import Predictor
from clmerge.deploy.routing import NearestCentroid, Routing, TaskOracle
from clmerge.deploy.routing.routed_models import RoutedModels
from clmerge.deploy.running_merge import RunningMerge
from clmerge.runs.stored_run import StoredRun


class Rerouted:
    """The routings of the models that are merged again.

    Args:
        run: The run.
        merge: The merged models.
        routings: The routings; copies without what they have collected are used.
    """

    def __init__(self, run: StoredRun, merge: RunningMerge, routings: Sequence[Routing]) -> None:
        self.run, self.merge = run, merge
        self.models = routed_models(run, copy.deepcopy(list(routings)))
        self._tasks: list[int] = []

    def collect(self, task: int) -> None:
        """Collect what the routings keep of the task that was folded in last."""
        self._tasks.append(task)
        self.models.collect(self.run.base, self.run.bank[task], task, self.run.device)

    def predictors(
        self, names: Sequence[str], seconds: Mapping[str, float]
    ) -> tuple[dict[str, Predictor], dict[str, float]]:
        """Return the predictors of routed models, and the seconds of each, given those of the merged models."""
        found = self.models.predictors(self.merge, names, self._tasks, self.run.device)
        return found, {name: seconds[name.rpartition("+")[0]] + self.models.seconds[name] for name in names}


def routed_models(run: StoredRun, routings: Sequence[Routing]) -> RoutedModels:
    """Return the routed models of a run without anything collected; refuses what cannot be."""
    return RoutedModels(
        routings,
        run.module,
        run.data,
        run.stream,
        adaptation=run.adaptation,
        num_images=run.statistics_images,
        vector=lambda task: run.bank[task],
        seed=run.seed,
    )


def routed_sizes(run: StoredRun, routings: Sequence[Routing]) -> dict[str, list[int]]:
    """Return the bytes that every routing keeps after every task, by its name."""
    models = routed_models(run, routings)
    frame = models.frame(run.base, torch.device("cpu"))
    counts = range(1, len(run.kept) + 1)
    return {name: [models.nbytes(name, frame, run.kept[:count]) for count in counts] for name in models.routings}


def with_references(routings: Sequence[Routing]) -> list[Routing]:
    """Add what routings are compared with, with the experts of the first: the oracle and the nearest centroid."""
    found = list(routings)
    for kind in (NearestCentroid, TaskOracle):
        if found and all(one.name != kind.name for one in found):
            found.append(kind(rank=routings[0].rank, targets=routings[0].targets))
    return found
