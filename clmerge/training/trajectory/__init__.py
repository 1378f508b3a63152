"""Rules that average the weights along the training of one task."""

from clmerge.training.trajectory.accepting import Accepting
from clmerge.training.trajectory.averages import EMA, Latest, Mean, mean_of
from clmerge.training.trajectory.horizons import Horizons
from clmerge.training.trajectory.loss_valley import LossValley
from clmerge.training.trajectory.rule import TrajectoryRule, Weights

__all__ = ["EMA", "Accepting", "Horizons", "Latest", "LossValley", "Mean", "TrajectoryRule", "Weights", "mean_of"]
