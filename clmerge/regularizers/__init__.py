"""Terms that are added to the loss of a task, so that training it does less harm to what was learned before."""

from clmerge.regularizers.distillation import LwF
from clmerge.regularizers.ewc import EWC
from clmerge.regularizers.features import FeatureDistance
from clmerge.regularizers.l2 import L2
from clmerge.regularizers.regularizer import Regularizer, Step, current_weights, regularized_loss
from clmerge.regularizers.second_order import IEL, ITA

__all__ = [
    "EWC",
    "IEL",
    "ITA",
    "L2",
    "FeatureDistance",
    "LwF",
    "Regularizer",
    "Step",
    "current_weights",
    "regularized_loss",
]
