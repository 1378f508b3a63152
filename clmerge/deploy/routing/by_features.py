"""Routings that compare an image's features of theta_0 with what is kept of every task's features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.deploy.routing.experts import Targets
from clmerge.deploy.routing.routers import CentroidRouter, FeatureRouter, GaussianRouter
from clmerge.deploy.routing.routing import Deployment, Frame, Routing, TaskEnd

Kept = dict[str, Tensor]


class ByFeatures(Routing):
    """Keep statistics of theta_0's features of every task, while its images are there.

    Features of theta_0 never change, so what is kept of a task is never outdated. The routed model keeps theta_0's
    encoder beside the merged weights, and every image passes through both.
    """

    def __init__(self, *, rank: int | None = 16, targets: Targets = "mlp") -> None:
        super().__init__(rank=rank, targets=targets)
        self.kept: dict[int, Kept] = {}

    @property
    @override
    def data(self) -> str:
        return "current"

    @abstractmethod
    def measure(self, features: Tensor, labels: Tensor) -> Kept:
        """Return what is kept of a task.

        Args:
            features: Features of theta_0 of its training images, ``(N, D)``, float64.
            labels: Global class ids, ``(N,)``.
        """

    @abstractmethod
    @override
    def chooser(self, tasks: Sequence[int]) -> FeatureRouter: ...

    @override
    def router(self, deployment: Deployment) -> FeatureRouter:
        return self.chooser(deployment.tasks)

    @override
    def collect(self, end: TaskEnd) -> None:
        super().collect(end)
        self.kept[end.task] = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in self.measure(*end.features()).items()
        }

    @abstractmethod
    def statistics_bytes(self, dim: int, num_classes: int) -> int:
        """Return the bytes of what ``measure`` keeps of a task.

        Args:
            dim: Number of features ``D``.
            num_classes: Number of classes of the task.
        """

    @override
    def nbytes(self, frame: Frame, classes: Sequence[Sequence[int]]) -> int:
        dim = frame.feature_dim
        return super().nbytes(frame, classes) + sum(self.statistics_bytes(dim, len(own)) for own in classes)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"kept": {task: dict(kept) for task, kept in self.kept.items()}}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.kept = {int(task): dict(kept) for task, kept in state["kept"].items()}


class DAM(ByFeatures):
    """Softmax over the nearest of the tasks' mean features (DAM, arXiv 2403.08755).

    Per image: the cosines of theta_0's features with the mean of every task's, of which the ``top_k`` largest are
    divided by a temperature. In the paper adapters are trained one after another and their *factors* are averaged;
    here the products are mixed, which leaves out the cross terms between tasks. State: one mean per task.

    Args:
        rank: As for ``Routing``.
        targets: As for ``Routing``.
        top_k: Tasks that an image uses.
        temperature: Divides the cosines.

    Raises:
        ValueError: For a number out of range.
    """

    name = "dam"
    source: ClassVar[str] = "2403.08755"
    summary: ClassVar[str] = "per image, softmax over the nearest mean features of the tasks"

    def __init__(
        self, *, rank: int | None = 16, targets: Targets = "mlp", top_k: int = 2, temperature: float = 0.01
    ) -> None:
        super().__init__(rank=rank, targets=targets)
        if top_k < 1 or not temperature > 0:
            raise ValueError(f"expected positive settings, got top_k={top_k}, temperature={temperature}")
        self.top_k = top_k
        self.temperature = temperature

    @override
    def measure(self, features: Tensor, labels: Tensor) -> Kept:
        return {"mean": features.mean(dim=0)}

    @override
    def statistics_bytes(self, dim: int, num_classes: int) -> int:
        return 4 * dim

    @override
    def chooser(self, tasks: Sequence[int]) -> FeatureRouter:
        return self._nearest(tasks, self.top_k, self.temperature)

    def _nearest(self, tasks: Sequence[int], top_k: int, temperature: float | None) -> FeatureRouter:
        means = torch.stack([self.kept[task]["mean"] for task in tasks])
        router = CentroidRouter(len(tasks), means.shape[1], top_k, temperature)
        router.centroids.copy_(means)
        return router


class NearestCentroid(DAM):
    """The expert of the task with the nearest mean feature alone; the baseline of all routers.

    With a merger that has a view for every task (EMR, TALL) it chooses one of the views instead.

    Args:
        rank: As for ``Routing``.
        targets: As for ``Routing``.
    """

    name = "nearest"
    source: ClassVar[str] = ""
    summary: ClassVar[str] = "per image, the task with the nearest mean feature; also among the views of EMR and TALL"
    for_views: ClassVar[bool] = True

    def __init__(self, *, rank: int | None = 16, targets: Targets = "mlp") -> None:
        super().__init__(rank=rank, targets=targets, top_k=1)


class Retrieval(DAM):
    """Equal weights for the tasks with the nearest mean features (LoraRetriever, arXiv 2402.09997, its mixture).

    With the mean over few nearest domains AdapterSoup (arXiv 2302.07027) averages the adapters' weights for a whole
    domain; here every image chooses for itself. What LoraRetriever calls fusion averages the factors of adapters, whose
    cross terms belong to no task; it is left out.

    Args:
        rank: As for ``Routing``.
        targets: As for ``Routing``.
        top_k: Tasks that an image uses; 3 in LoraRetriever.

    Raises:
        ValueError: For a number out of range.
    """

    name = "retrieval"
    source: ClassVar[str] = "2402.09997"
    summary: ClassVar[str] = "per image, equal weights for the tasks with the nearest mean features"

    def __init__(self, *, rank: int | None = 16, targets: Targets = "mlp", top_k: int = 3) -> None:
        super().__init__(rank=rank, targets=targets, top_k=top_k)

    @override
    def chooser(self, tasks: Sequence[int]) -> FeatureRouter:
        return self._nearest(tasks, self.top_k, None)


class GaussianPosterior(ByFeatures):
    """Posterior of the tasks under one Gaussian of features per class, with one covariance for all.

    A class counts with its number of images. The covariance is that within the classes, pooled over all tasks so far,
    plus ``ridge`` times its mean variance on the diagonal. With a merger that has a view for every task (EMR, TALL),
    the most likely task's view answers. State: a mean per class, and one covariance per task.

    Args:
        rank: As for ``Routing``.
        targets: As for ``Routing``.
        ridge: Added to the covariance, as a share of its mean variance; few images need more.

    Raises:
        ValueError: If the ridge is not positive.
    """

    name = "gaussian"
    summary: ClassVar[str] = "per image, the tasks' posterior under Gaussians of features; also among views"
    for_views: ClassVar[bool] = True

    def __init__(self, *, rank: int | None = 16, targets: Targets = "mlp", ridge: float = 0.1) -> None:
        super().__init__(rank=rank, targets=targets)
        if not ridge > 0:
            raise ValueError(f"expected a ridge above 0, got {ridge}")
        self.ridge = ridge

    @override
    def measure(self, features: Tensor, labels: Tensor) -> Kept:
        means, counts = [], []
        scatter = torch.zeros(features.shape[1], features.shape[1], dtype=features.dtype)
        for label in torch.unique(labels).tolist():
            own = features[labels == label]
            means.append(own.mean(dim=0))
            counts.append(len(own))
            centred = own - means[-1]
            scatter += centred.T @ centred
        return {"means": torch.stack(means), "counts": torch.tensor(counts), "scatter": scatter}

    @override
    def statistics_bytes(self, dim: int, num_classes: int) -> int:
        return num_classes * (4 * dim + 8) + 4 * dim * dim

    def gaussians(self, tasks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return means ``(N, D)``, the covariance ``(D, D)``, and number of images and task of every Gaussian.

        Args:
            tasks: Indices of the tasks; the task of a Gaussian is its place among them.
        """
        kept = [self.kept[task] for task in tasks]
        means = torch.cat([each["means"] for each in kept])
        counts = torch.cat([each["counts"] for each in kept])
        owner = torch.arange(len(kept)).repeat_interleave(torch.tensor([len(each["counts"]) for each in kept]))
        # A sum in float64 of few terms: the order of the tasks changes the last bits at most.
        total = torch.stack([each["scatter"].double() for each in kept]).sum(dim=0)
        covariance = total / max(1, int(counts.sum()) - len(means))
        floor = covariance.diagonal().mean().clamp(min=torch.finfo(torch.float32).eps) * self.ridge
        return means, covariance + floor * torch.eye(len(covariance), dtype=covariance.dtype), counts, owner

    @override
    def chooser(self, tasks: Sequence[int]) -> FeatureRouter:
        means, covariance, counts, owner = self.gaussians(tasks)
        return GaussianRouter(len(tasks), len(means), means.shape[1]).fit(means, counts, owner, covariance)
