"""One Gaussian of features per class and task, and sampling from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class ClassGaussians:
    """Means and covariances of features, class by class.

    Attributes:
        classes: Class of every Gaussian, ``(N,)``.
        tasks: Task of every Gaussian, ``(N,)``.
        means: ``(N, D)``, float32.
        covariances: ``(N, D, D)``, float32.
    """

    def __init__(self) -> None:
        self.classes = torch.empty(0, dtype=torch.long)
        self.tasks = torch.empty(0, dtype=torch.long)
        self.means = torch.empty(0, 0)
        self.covariances = torch.empty(0, 0, 0)

    def __len__(self) -> int:
        return len(self.classes)

    @staticmethod
    def bytes_each(dim: int) -> int:
        """Return the bytes of one Gaussian of ``dim`` features: float32 mean and covariance, class and task."""
        return 4 * (dim + dim * dim) + 16

    def add(self, features: Tensor, labels: Tensor, task: int) -> None:
        """Add a Gaussian for each class of a task.

        Mean and unbiased covariance in float64; the covariance of a single image is zero.

        Args:
            features: ``(num_images, D)``.
            labels: Class of each image, ``(num_images,)``.
            task: Index of the task.
        """
        for label in torch.unique(labels).tolist():
            own = features[labels == label].double()
            mean = own.mean(dim=0)
            centred = own - mean
            covariance = centred.T @ centred / max(1, len(own) - 1)
            dim = len(mean)
            self.classes = torch.cat([self.classes, torch.tensor([label])])
            self.tasks = torch.cat([self.tasks, torch.tensor([task])])
            self.means = torch.cat([self.means.view(-1, dim), mean.float().cpu()[None]])
            self.covariances = torch.cat([self.covariances.view(-1, dim, dim), covariance.float().cpu()[None]])

    def sample(self, num: int, *, generator: torch.Generator, ridge: float, shrink: Tensor | None = None) -> Tensor:
        """Draw from every Gaussian.

        Args:
            num: Draws from each.
            generator: A CPU generator.
            ridge: Added to the diagonal of every covariance.
            shrink: Factors of the means, ``(N,)``; default 1.

        Returns:
            ``(N, num, D)``, float32.
        """
        dim = self.means.shape[1]
        covariances = self.covariances.double() + ridge * torch.eye(dim, dtype=torch.float64)
        noise = torch.randn(len(self), num, dim, generator=generator, dtype=torch.float64)
        means = self.means.double() if shrink is None else self.means.double() * shrink.double()[:, None]
        factors: Tensor = torch.linalg.cholesky(covariances)
        return (means[:, None] + noise @ factors.mT).float()

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        return {
            "classes": self.classes,
            "tasks": self.tasks,
            "means": self.means,
            "covariances": self.covariances,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by ``state_dict``."""
        self.classes, self.tasks = state["classes"], state["tasks"]
        self.means, self.covariances = state["means"], state["covariances"]
