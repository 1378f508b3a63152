"""Match the units of networks that did not start from the same weights, and carry task vectors to another base."""

from clmerge.alignment.matching import ActivationMatching, Aligner, WeightMatching
from clmerge.alignment.reparametrization import Reparametrization, UnitMap, identity, random_reparametrization
from clmerge.alignment.spec import Axis, Group, PermutationSpec
from clmerge.alignment.tables import spec_of

__all__ = [
    "ActivationMatching",
    "Aligner",
    "Axis",
    "Group",
    "PermutationSpec",
    "Reparametrization",
    "UnitMap",
    "WeightMatching",
    "identity",
    "random_reparametrization",
    "spec_of",
]
