"""Routings without statistics: the oracle of all routers, and the experts' own confidence."""

from __future__ import annotations

from typing import ClassVar

import torch
from typing_extensions import override

from clmerge.deploy.routing.routed import Routed, RoutedByTask
from clmerge.deploy.routing.routers import ConfidenceRouter, FixedRouter, Router
from clmerge.deploy.routing.routing import Deployment, Routing


class TaskOracle(Routing):
    """The expert of the task that an image is known to be of: what no router of these experts can beat by choosing.

    It has task-aware accuracies alone.

    Args:
        rank: As for ``Routing``.
        targets: As for ``Routing``.
    """

    name = "oracle"
    summary: ClassVar[str] = "the expert of the image's own task, which must be given: the oracle of all routers"
    predictor_class: ClassVar[type[Routed]] = RoutedByTask

    @override
    def router(self, deployment: Deployment) -> Router:
        return FixedRouter(len(deployment.tasks))


class ExpertConfidence(Routing):
    """Posterior of the tasks by how sure their experts are (Branch-Train-Merge, arXiv 2208.03306).

    A language model gives a text a likelihood; an image classifier has none. In its place stands the probability that
    an expert gives to the classes of its own task, among all classes seen so far. The prior is uniform: the paper
    estimates it on development data and keeps it fixed. Costs one pass per task and image.

    Args:
        rank: As for ``Routing``.
        targets: As for ``Routing``.
    """

    name = "confidence"
    source: ClassVar[str] = "2208.03306"
    summary: ClassVar[str] = "per image, the experts by the probability that each gives to its own task's classes"

    @override
    def router(self, deployment: Deployment) -> Router:
        router = ConfidenceRouter(len(deployment.tasks), deployment.num_classes)
        for column, classes in enumerate(deployment.classes):
            router.owned[column, torch.tensor(list(classes))] = 1.0
        return router
