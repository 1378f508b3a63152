"""Match the units of networks that did not start from the same weights, and carry task vectors to another base."""

from clmerge.alignment.activations import correlations
from clmerge.alignment.auto import Auto
from clmerge.alignment.barrier import barrier
from clmerge.alignment.by_gradient import SinkhornMatching, StraightThroughMatching
from clmerge.alignment.lift import deepen, layer_map, widen
from clmerge.alignment.matching import ActivationMatching, Aligner, WeightMatching
from clmerge.alignment.procrustes import Procrustes
from clmerge.alignment.reparametrization import Reparametrization, UnitMap, identity
from clmerge.alignment.soft import CCAMatching, OTFusion
from clmerge.alignment.spec import Axis, Group, PermutationSpec
from clmerge.alignment.tables import spec_of
from clmerge.alignment.transport import GradientSignMask, Identity, Permuted, Swap, Transport
from clmerge.alignment.universe import Universe
from clmerge.alignment.zipping import zipped

__all__ = [
    "ActivationMatching",
    "Aligner",
    "Auto",
    "Axis",
    "CCAMatching",
    "GradientSignMask",
    "Group",
    "Identity",
    "OTFusion",
    "PermutationSpec",
    "Permuted",
    "Procrustes",
    "Reparametrization",
    "SinkhornMatching",
    "StraightThroughMatching",
    "Swap",
    "Transport",
    "UnitMap",
    "Universe",
    "WeightMatching",
    "barrier",
    "correlations",
    "deepen",
    "identity",
    "layer_map",
    "spec_of",
    "widen",
    "zipped",
]
