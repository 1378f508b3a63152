"""Mergers: streaming rules that fold in one task vector at a time. Pure tensor code."""

from clmerge.merging.finish.finisher import ClipNorm, Finisher, Scale
from clmerge.merging.finish.grouped import GroupScale
from clmerge.merging.finish.layers import LayerScale, LiNeS
from clmerge.merging.finish.truncate import TruncateRank
from clmerge.merging.joining import joined
from clmerge.merging.learned.adamerging import AdaMerging
from clmerge.merging.learned.adarank import AdaRank
from clmerge.merging.learned.atlas import ATLAS
from clmerge.merging.learned.concrete import ConcreteMask
from clmerge.merging.learned.learned import Learned, Moment, weighted
from clmerge.merging.learned.soups import HyperplaneSoup, LearnedSoup, TrajectorySoup
from clmerge.merging.learned.zip import ZipMerge
from clmerge.merging.linear.arithmetic import TaskArithmetic, WeightAverage
from clmerge.merging.linear.cocktail import LMCocktail
from clmerge.merging.linear.cofima import CoFiMA
from clmerge.merging.linear.factors import FactorProduct
from clmerge.merging.linear.fedatt import FedAtt
from clmerge.merging.linear.fednova import FedNova
from clmerge.merging.linear.interpolation import PAINT, WiSEFT
from clmerge.merging.linear.metagpt import MetaGPT
from clmerge.merging.linear.random_mix import RandomMix
from clmerge.merging.linear.slerp import SLERP
from clmerge.merging.linear.soup import GreedySoup, SortedSoup
from clmerge.merging.linear.ssu import SSU
from clmerge.merging.linear.stock import ModelStock
from clmerge.merging.linear.subtraction import ExtSub
from clmerge.merging.linear.sum import Sum
from clmerge.merging.linear.weighted import WeightedAverage
from clmerge.merging.linear.weighted_sum import WeightedSum
from clmerge.merging.matrices import Matrices
from clmerge.merging.merger import Merger
from clmerge.merging.objectives import (
    Agreement,
    CrossEntropy,
    Distillation,
    Entropy,
    FeatureMatch,
    Given,
    Objective,
    Outputs,
)
from clmerge.merging.pipeline import Pipeline
from clmerge.merging.precision.became import BECAME
from clmerge.merging.precision.dop import DOP
from clmerge.merging.precision.fisher import UGM, Fisher
from clmerge.merging.precision.fisher_mask_nodes import FisherMaskNodes
from clmerge.merging.precision.gram import Gram
from clmerge.merging.precision.lorm import LoRM
from clmerge.merging.precision.mats import MaTS
from clmerge.merging.precision.regmean import RegMean
from clmerge.merging.precision.wudi import WUDI, ACTMat
from clmerge.merging.registry import registered_mergers
from clmerge.merging.sign.emr import EMR
from clmerge.merging.sign.magmax import MagMax
from clmerge.merging.sign.pcb import PCB
from clmerge.merging.sign.tall import TALL, Consensus
from clmerge.merging.sign.ties import TIES
from clmerge.merging.sign.tunable_magmax import TunableMagMax
from clmerge.merging.sign.widen import WIDEN
from clmerge.merging.sparsify.breadcrumbs import Breadcrumbs, BreadcrumbsMask
from clmerge.merging.sparsify.by_task import ByTask
from clmerge.merging.sparsify.dare import DARE
from clmerge.merging.sparsify.della import DELLA, MagnitudeDrop
from clmerge.merging.sparsify.quantise import Quantise
from clmerge.merging.sparsify.sparsifier import RandomDrop, Sparsifier, TrimModel, TrimTensor
from clmerge.merging.spectral.adapters import (
    adapter_of,
    mean_of_factors,
    negate_adapter,
    sum_adapters,
    truncate_adapter,
)
from clmerge.merging.spectral.dc import DCMerge
from clmerge.merging.spectral.decomposition import Spectral
from clmerge.merging.spectral.ethos import Ethos
from clmerge.merging.spectral.iso import IsoC
from clmerge.merging.spectral.iso_cts import IsoCTS
from clmerge.merging.spectral.knots import KnOTS
from clmerge.merging.spectral.nufilt import NuFilt
from clmerge.merging.spectral.opcm import OPCM
from clmerge.merging.spectral.svc import SVC
from clmerge.merging.spectral.tsvm import TSVM
from clmerge.merging.step import Gradient, Gradients, Score, Statistics
from clmerge.merging.stored import Stored, relocated
from clmerge.merging.strategies.weight_search import WeightSearch

__all__ = [
    "ATLAS",
    "BECAME",
    "DARE",
    "DELLA",
    "DOP",
    "EMR",
    "OPCM",
    "PAINT",
    "PCB",
    "SLERP",
    "SSU",
    "SVC",
    "TALL",
    "TIES",
    "TSVM",
    "UGM",
    "WIDEN",
    "WUDI",
    "ACTMat",
    "AdaMerging",
    "AdaRank",
    "Agreement",
    "Breadcrumbs",
    "BreadcrumbsMask",
    "ByTask",
    "ClipNorm",
    "CoFiMA",
    "ConcreteMask",
    "Consensus",
    "CrossEntropy",
    "DCMerge",
    "Distillation",
    "Entropy",
    "Ethos",
    "ExtSub",
    "FactorProduct",
    "FeatureMatch",
    "FedAtt",
    "FedNova",
    "Finisher",
    "Fisher",
    "FisherMaskNodes",
    "Given",
    "Gradient",
    "Gradients",
    "Gram",
    "GreedySoup",
    "GroupScale",
    "HyperplaneSoup",
    "IsoC",
    "IsoCTS",
    "KnOTS",
    "LMCocktail",
    "LayerScale",
    "Learned",
    "LearnedSoup",
    "LiNeS",
    "LoRM",
    "MaTS",
    "MagMax",
    "MagnitudeDrop",
    "Matrices",
    "Merger",
    "MetaGPT",
    "ModelStock",
    "Moment",
    "NuFilt",
    "Objective",
    "Outputs",
    "Pipeline",
    "Quantise",
    "RandomDrop",
    "RandomMix",
    "RegMean",
    "Scale",
    "Score",
    "SortedSoup",
    "Sparsifier",
    "Spectral",
    "Statistics",
    "Stored",
    "Sum",
    "TaskArithmetic",
    "TrajectorySoup",
    "TrimModel",
    "TrimTensor",
    "TruncateRank",
    "TunableMagMax",
    "WeightAverage",
    "WeightSearch",
    "WeightedAverage",
    "WeightedSum",
    "WiSEFT",
    "ZipMerge",
    "adapter_of",
    "joined",
    "mean_of_factors",
    "negate_adapter",
    "registered_mergers",
    "relocated",
    "sum_adapters",
    "truncate_adapter",
    "weighted",
]
