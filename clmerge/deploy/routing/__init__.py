"""Routings: deployable models that mix low-rank experts of the tasks for every image.

Importing this room, and loading a routed model, needs neither Lightning nor Avalanche.
"""

from clmerge.deploy.routing.by_features import DAM, ByFeatures, GaussianPosterior, NearestCentroid, Retrieval
from clmerge.deploy.routing.fixed import ExpertConfidence, TaskOracle
from clmerge.deploy.routing.mingle import Mingle
from clmerge.deploy.routing.mixture import Gates, MixtureLinear
from clmerge.deploy.routing.routed_model import RoutedModel, load_routed
from clmerge.deploy.routing.routers import FeatureRouter, LayerRouter, Router
from clmerge.deploy.routing.routing import Deployment, Routing, TaskEnd
from clmerge.deploy.routing.smile import Smile
from clmerge.deploy.routing.twin_merging import TwinMerging
from clmerge.deploy.routing.wemoe import PWEMoE, WEMoE

__all__ = [
    "DAM",
    "ByFeatures",
    "Deployment",
    "ExpertConfidence",
    "FeatureRouter",
    "Gates",
    "GaussianPosterior",
    "LayerRouter",
    "Mingle",
    "MixtureLinear",
    "NearestCentroid",
    "PWEMoE",
    "Retrieval",
    "RoutedModel",
    "Router",
    "Routing",
    "Smile",
    "TaskEnd",
    "TaskOracle",
    "TwinMerging",
    "WEMoE",
    "load_routed",
]
