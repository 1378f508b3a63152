"""Terms that are added to the loss of a task to reduce forgetting of earlier tasks."""

from clmerge.training.regularizers.bad_merging import BadMerging
from clmerge.training.regularizers.distillation import LwF
from clmerge.training.regularizers.ewc import EWC
from clmerge.training.regularizers.features import FeatureDistance
from clmerge.training.regularizers.foreign import Distillation, Teacher
from clmerge.training.regularizers.l2 import L2
from clmerge.training.regularizers.mean_teacher import MeanTeacher
from clmerge.training.regularizers.regularizer import LossStep, Regularizer, current_weights, regularized_logits
from clmerge.training.regularizers.second_order import IEL, ITA
from clmerge.training.regularizers.trades import TRADES
from clmerge.training.regularizers.watermark import WeightWatermark

__all__ = [
    "EWC",
    "IEL",
    "ITA",
    "L2",
    "TRADES",
    "BadMerging",
    "Distillation",
    "FeatureDistance",
    "LossStep",
    "LwF",
    "MeanTeacher",
    "Regularizer",
    "Teacher",
    "WeightWatermark",
    "current_weights",
    "regularized_logits",
]
