"""Mergers: streaming rules that fold one task vector at a time into the running model. Pure tensor code."""

from clmerge.merging.adapters import adapter_of, mean_of_factors, negate_adapter, sum_adapters, truncate_adapter
from clmerge.merging.became import BECAME
from clmerge.merging.breadcrumbs import Breadcrumbs, BreadcrumbsMask
from clmerge.merging.by_task import ByTask
from clmerge.merging.cofima import CoFiMA
from clmerge.merging.dare import DARE
from clmerge.merging.della import DELLA, MagnitudeDrop
from clmerge.merging.dop import DOP
from clmerge.merging.emr import EMR
from clmerge.merging.ethos import Ethos
from clmerge.merging.fedatt import FedAtt
from clmerge.merging.fednova import FedNova
from clmerge.merging.finish import ClipNorm, Finisher, Scale
from clmerge.merging.fisher import UGM, Fisher
from clmerge.merging.fisher_mask_nodes import FisherMaskNodes
from clmerge.merging.grouped import GroupScale
from clmerge.merging.interpolation import PAINT, WiSEFT
from clmerge.merging.iso import IsoC
from clmerge.merging.iso_cts import IsoCTS
from clmerge.merging.knots import KnOTS
from clmerge.merging.layers import LayerScale, LiNeS
from clmerge.merging.linear import TaskArithmetic, WeightAverage
from clmerge.merging.magmax import MagMax
from clmerge.merging.matrices import Matrices
from clmerge.merging.mats import MaTS
from clmerge.merging.merger import Merger
from clmerge.merging.metagpt import MetaGPT
from clmerge.merging.opcm import OPCM
from clmerge.merging.pcb import PCB
from clmerge.merging.pipeline import Pipeline
from clmerge.merging.quantise import Quantise
from clmerge.merging.random_mix import RandomMix
from clmerge.merging.registry import registered_mergers
from clmerge.merging.regmean import RegMean
from clmerge.merging.slerp import SLERP
from clmerge.merging.soup import GreedySoup
from clmerge.merging.sparsify import RandomDrop, Sparsifier, TrimModel, TrimTensor
from clmerge.merging.step import Score, Statistics
from clmerge.merging.stock import ModelStock
from clmerge.merging.subtraction import ExtSub
from clmerge.merging.tall import TALL, Consensus
from clmerge.merging.ties import TIES
from clmerge.merging.truncate import TruncateRank
from clmerge.merging.tsvm import TSVM
from clmerge.merging.tunable_magmax import TunableMagMax
from clmerge.merging.weighted import WeightedAverage
from clmerge.merging.wudi import WUDI, ACTMat

__all__ = [
    "BECAME",
    "DARE",
    "DELLA",
    "DOP",
    "EMR",
    "OPCM",
    "PAINT",
    "PCB",
    "SLERP",
    "TALL",
    "TIES",
    "TSVM",
    "UGM",
    "WUDI",
    "ACTMat",
    "Breadcrumbs",
    "BreadcrumbsMask",
    "ByTask",
    "ClipNorm",
    "CoFiMA",
    "Consensus",
    "Ethos",
    "ExtSub",
    "FedAtt",
    "FedNova",
    "Finisher",
    "Fisher",
    "FisherMaskNodes",
    "GreedySoup",
    "GroupScale",
    "IsoC",
    "IsoCTS",
    "KnOTS",
    "LayerScale",
    "LiNeS",
    "MaTS",
    "MagMax",
    "MagnitudeDrop",
    "Matrices",
    "Merger",
    "MetaGPT",
    "ModelStock",
    "Pipeline",
    "Quantise",
    "RandomDrop",
    "RandomMix",
    "RegMean",
    "Scale",
    "Score",
    "Sparsifier",
    "Statistics",
    "TaskArithmetic",
    "TrimModel",
    "TrimTensor",
    "TruncateRank",
    "TunableMagMax",
    "WeightAverage",
    "WeightedAverage",
    "WiSEFT",
    "adapter_of",
    "mean_of_factors",
    "negate_adapter",
    "registered_mergers",
    "sum_adapters",
    "truncate_adapter",
]
