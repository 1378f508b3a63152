"""Fold a run's task vectors again, in any order, and evaluate the merged models; stored rows are reused."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy

from lightning.pytorch import LightningModule

from clmerge.deploy.calibration import Calibration
from clmerge.deploy.naming import check_settings
from clmerge.deploy.predictors import Predictor
from clmerge.deploy.routing import Routing
from clmerge.deploy.routing.routed_models import routed_names
from clmerge.deploy.running_merge import RunningMerge
from clmerge.evaluation.evaluate import Split
from clmerge.evaluation.probes import Probe
from clmerge.merging import Merger, Statistics
from clmerge.names import tell
from clmerge.runs.comparison.recalibrated import Recalibrated, calibrated_names
from clmerge.runs.comparison.rerouted import Rerouted
from clmerge.runs.comparison.row_cache import CachedRow, RowCache, make_row
from clmerge.runs.stored_run import StoredRun
from clmerge.search.grid import with_values
from clmerge.statistics.provided import PROVIDED
from clmerge.weights import BankVector, CheckedVector
from clmerge.weights.parametrization import own_names
from clmerge.weights.swap import swapped

Table = dict[str, dict[int, CachedRow]]
"""Model -> number of merged tasks -> row."""


class Refold:
    """Merge the task vectors of a run as ``fit`` did, with other mergers or in another order.

    Args:
        run: The run.
        mergers: Mergers by name; new mergers with the same settings are used.

    Raises:
        ValueError: If a merger requires statistics that cannot be measured again.
    """

    def __init__(self, run: StoredRun, mergers: Mapping[str, Merger]) -> None:
        self.run = run
        self.order: list[int] = []
        self._task = 0
        self.merge = RunningMerge(
            {name: with_values(merger, {}) for name, merger in mergers.items()},
            base=run.base,
            buffers=run.config["learner"]["buffers"],
            score=lambda module: run.score(self.order),
            losses=run.losses,
            statistics=self._statistics,
            images=lambda module: run.images(self.order[-1]),
        )
        own = own_names(run.module)
        with swapped(run.module, {own[name]: tensor for name, tensor in run.base_statistics.items()}):
            self.merge.start(run.module, run.module.trained_names)

    def fold(self, task: int) -> None:
        """Fold one more task in.

        Args:
            task: Its index in the run; it seeds random rules, whatever the order.
        """
        self.run.enter(task)
        self.order.append(task)
        self._task = task
        self.merge.fold(self._vector(task), self.run.module, task=task, given={"weights": self.run.base})

    def take_out(self, task: int) -> None:
        """Take one task out of every merger by ``downdate``; predictors that were built before stay as they are.

        Args:
            task: A task that was folded in.

        Raises:
            TypeError: If a merger is not removable.
            ValueError: If too little of one would remain; no merger is changed then.
        """
        self.run.enter(task)
        self._task = task
        vector, merge = self._vector(task), self.merge
        statistics = merge.measured(vector, self.run.module, {"weights": self.run.base})
        without = deepcopy(merge.mergers)
        for merger in without.values():
            merger.downdate(vector, task=task, base=merge.base_fingerprint, statistics=statistics)
        merge.mergers = without
        self.order.remove(task)

    def _vector(self, task: int) -> CheckedVector:
        vector = CheckedVector(self.run.bank[task])
        vector.stored = BankVector(self.run.bank, task)  # rules that keep every vector read it there
        return vector

    def _statistics(self, module: LightningModule) -> Statistics:
        return self.run.measure_again(self.merge.required_statistics - PROVIDED, self._task)


def check_mergers(run: StoredRun, mergers: Mapping[str, Merger]) -> None:
    """Refuse mergers that require statistics that cannot be measured again, before anything is computed.

    Raises:
        ValueError: If a merger requires Adam's second moments, validation images that the stream does not have, or
            other adaptation data, or its settings do not fit the run's parameters and tasks.
    """
    check_settings(mergers, run.base, len(run.tasks))
    run.check_learning(mergers)
    for name, merger in mergers.items():
        if "adam" in merger.requires:
            raise ValueError(
                f"expected mergers whose statistics can be measured again, got {name!r}, which requires the second "
                "moments of Adam: they are there at the end of training only; name it in --mergers of `clmerge fit`"
            )
        if merger.requires_score and not run.has_validation:
            raise ValueError(
                f"expected validation images for merger {name!r}, got a run of a stream that holds none out; "
                "train with stream.val_fraction above 0"
            )


def sweep(
    run: StoredRun,
    mergers: Mapping[str, Merger],
    cache: RowCache,
    *,
    order: Sequence[int] | None = None,
    split: Split = "test",
    last_only: bool = False,
    what: str = "models",
    memory: int = 2**32,
    calibrations: Sequence[Calibration] = (),
    routings: Sequence[Routing] = (),
    probes: Sequence[Probe] = (),
) -> Table:
    """Merge a run's tasks in an order with several mergers, and evaluate after every task.

    All mergers share one pass over the vectors and, after every task, one pass over the images, as far as ``memory``
    allows; a row in the cache is not computed again.

    Args:
        run: The run.
        mergers: Mergers by name.
        cache: Stores the rows.
        order: Indices of tasks; default the kept tasks in the order of the run.
        split: Images to evaluate on.
        last_only: Evaluate only after the last task of the order.
        what: Name of the models in the progress display.
        memory: Bytes of accumulators and merged weights that are held at a time.
        calibrations: Calibrations of the merged models; their data of every task is collected anew.
        routings: Routed models around the merged ones; what they keep of every task is collected anew.
        probes: Probes of all models.

    Returns:
        Model -> number of merged tasks -> row; calibrated and routed models are ``MERGER+NAME``.
    """
    order = run.kept if order is None else list(order)
    counts = [len(order)] if last_only else list(range(1, len(order) + 1))
    told = {name: told_rule(run, merger) for name, merger in mergers.items()}
    calibrated_of = calibrated_names(mergers, calibrations)
    for name, found in calibrated_of.items():
        told |= {each: f"{told[name]}, {one!r} on {one.data}, seed {run.seed}" for each, one in found.items()}
    routed_of = routed_names(mergers, routings)
    for name, routed in routed_of.items():
        told |= {each: f"{told[name]}, {one!r} {_seen(run, one)}" for each, one in routed.items()}
    if probes:
        told = {name: f"{text}, probed by {[*probes]!r}" for name, text in told.items()}
    keys = {
        (name, count): cache.key(run.identity, text, split, order[:count])
        for name, text in told.items()
        for count in counts
    }
    for group in _groups(run, mergers, memory, len(order), models=1 + len(calibrations) + len(routings)):
        names = [*group, *(each for name in group for each in (*calibrated_of[name], *routed_of[name]))]
        last = max((c for name in names for c in counts if keys[name, c] not in cache), default=0)
        refold = Refold(run, group)
        recalibrated = Recalibrated(run, refold.merge, calibrations)
        rerouted = Rerouted(run, refold.merge, routings)
        routes = any(keys[e, c] not in cache for name in group for e in routed_of[name] for c in counts)
        for count, task in enumerate(order[:last], start=1):
            refold.fold(task)
            recalibrated.collect(
                [n for n in group if any(keys[e, c] not in cache for e in calibrated_of[n] for c in counts)], task
            )
            if routes:
                rerouted.collect(task)
            missing = [name for name in names if (name, count) in keys and keys[name, count] not in cache]
            if not missing:
                continue
            merged = [name for name in group if {name, *calibrated_of[name], *routed_of[name]} & set(missing)]
            predictors, seconds = _merged(run, refold.merge, merged)
            others = [name for name in missing if not any(name in routed for routed in routed_of.values())]
            routed_predictors, took = rerouted.predictors([name for name in missing if name not in others], seconds)
            predictors, seconds = recalibrated.add(predictors, seconds, others, task)
            predictors, seconds = {**predictors, **routed_predictors}, {**seconds, **took}
            label = f"{run.name}: task {count}/{len(order)}: {len(missing)} {what}, {split} images"
            with _line(label, silent=run.trainers.progress):
                confusion = split == "test" and order[:count] == list(range(len(run.tasks)))
                rows = run.evaluate_again(
                    label,
                    predictors,
                    max(order[:count]),
                    split,
                    confusion=confusion,
                    probes=probes,
                    weights=refold.merge.weights_by_name(merged),
                    last=count == len(order),
                )
            cache.add({keys[name, count]: make_row(rows[name], seconds[name]) for name in missing})
    return {name: {count: cache[keys[name, count]] for count in counts} for name in told}


def _seen(run: StoredRun, routing: Routing) -> str:
    """Return what a routing gets to see, and the seed."""
    learned = f" and {run.adaptation!r}" if routing.adapts else ""
    return f"on {run.statistics_images} images{learned}, seed {run.seed}"


def told_rule(run: StoredRun, merger: Merger) -> str:
    """Return a merger with its settings, what it is scored by where that is unusual, and what it learns on."""
    scored = merger.requires_score and run.evaluation != "task_agnostic"
    learned = f" on {run.adaptation!r}" if merger.requires_gradient else ""
    return f"{merger!r}{f' by {run.evaluation}' if scored else ''}{' per task' if merger.task_views else ''}{learned}"


def _merged(run: StoredRun, merge: RunningMerge, names: Sequence[str]) -> tuple[dict[str, Predictor], dict[str, float]]:
    predictors: dict[str, Predictor] = {}
    seconds = {}
    for name in names:
        started = time.perf_counter()
        predictors[name] = merge.predictor(name, run.module)
        seconds[name] = merge.update_seconds[name] + time.perf_counter() - started
    return predictors, seconds


def _groups(
    run: StoredRun, mergers: Mapping[str, Merger], memory: int, num_tasks: int, *, models: int
) -> Iterator[dict[str, Merger]]:
    """Split mergers into groups of at least one whose accumulators and weights fit into ``memory`` bytes.

    Every merger has the weights of ``models`` models.
    """
    group: dict[str, Merger] = {}
    used = 0
    for name, merger in mergers.items():
        size = merger.state_size(run.shapes, num_tasks) + 4 * models * run.num_parameters
        if group and used + size > memory:
            yield group
            group, used = {}, 0
        group[name] = merger
        used += size
    if group:
        yield group


@contextmanager
def _line(label: str, *, silent: bool) -> Iterator[None]:
    """Print one line to stderr when a step is done, if there is no progress bar."""
    started = time.perf_counter()
    yield
    if not silent:
        tell(f"{label}: {time.perf_counter() - started:.1f} s")
