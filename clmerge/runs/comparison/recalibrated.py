"""Calibrate the models that are merged again, as ``fit`` does."""

import copy
from collections.abc import Mapping, Sequence

from clmerge.deploy.calibration import CalibratedModels, Calibration
from clmerge.deploy.predictors import Merged, Predictor
from clmerge.deploy.running_merge import RunningMerge
from clmerge.merging import Merger
from clmerge.runs.stored_run import StoredRun


def calibrated_names(
    mergers: Mapping[str, Merger], calibrations: Sequence[Calibration]
) -> dict[str, dict[str, Calibration]]:
    """Return merger -> calibrated model -> calibration; none for a merger with weights per task."""
    return {
        name: {} if merger.task_views else {f"{name}+{one.name}": one for one in calibrations}
        for name, merger in mergers.items()
    }


class Recalibrated:
    """The calibrations of the models that are merged again."""

    def __init__(self, run: StoredRun, merge: RunningMerge, calibrations: Sequence[Calibration]) -> None:
        self.run, self.merge = run, merge
        self.models = CalibratedModels(
            copy.deepcopy(list(calibrations)), run.module, run.data, run.stream, seed=run.seed
        )

    def collect(self, names: Sequence[str], task: int) -> None:
        """Collect what the calibrations of some mergers keep of the task that was folded in last."""
        if names:
            merged = {
                name: self.merge.state_with(self.merge.merged_vector(name), self.run.module, merger=name)
                for name in names
            }
            self.models.collect(merged, task, self.run.device, expert=lambda: self.run.expert(task))

    def add(
        self, predictors: Mapping[str, Predictor], seconds: Mapping[str, float], wanted: Sequence[str], task: int
    ) -> tuple[dict[str, Predictor], dict[str, float]]:
        """Add calibrated models to merged ones, and return those that are wanted."""
        found, took = dict(predictors), dict(seconds)
        chosen = {name.rpartition("+")[0] for name in wanted if name not in found}
        merged = {name: one.state for name, one in found.items() if name in chosen and isinstance(one, Merged)}
        for name, predictor in self.models.predictors(merged, task, self.run.device).items():
            found[name] = predictor
            took[name] = took[name.rpartition("+")[0]] + self.models.seconds[name]
        return {name: found[name] for name in wanted}, took
