"""Twin-Merging: what a task knows beyond the merged model, added per image by a trained router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from clmerge.deploy.routing.by_features import GaussianPosterior
from clmerge.deploy.routing.experts import Experts, Targets, experts_of
from clmerge.deploy.routing.gate_training import descend
from clmerge.deploy.routing.routers import FeatureRouter, MLPRouter
from clmerge.deploy.routing.routing import Deployment, Frame, TaskEnd
from clmerge.seeds import seeded_generator
from clmerge.weights.task_vector import State


class TwinMerging(GaussianPosterior):
    """The merged model plus, per image, low-rank parts of what separates the experts from it (arXiv 2406.15479).

    Here the mixed layers are the merged ones, and an expert is ``theta_t - theta_merged``, truncated: with the gate of
    one task at 1 and full rank, the mixed layers are those of that task's expert. As the merged model moves with every
    task, all experts are computed anew from the stored task vectors.

    The router is a network of two hidden layers that tells the tasks apart. The paper trains it on labelled texts of
    all tasks, by the merged model's hidden states, with BatchNorm and dropout. Here old images are gone and the merged
    model moves: it is trained on draws from Gaussians of theta_0's features, one per class with a common covariance,
    that are kept of every task, and has neither. Normalisation layers and all else that is not mixed are the merger's.

    Args:
        rank: Singular triplets per layer and task.
        targets: As for ``Routing``.
        ridge: Added to the covariance, as a share of its mean variance.
        per_class: Features drawn per class.
        steps: Optimizer steps of the router, on batches of 256 draws.
        lr: Learning rate of Adam.
        seed: Seed of the draws, of their order and of the router's initial weights.

    Raises:
        ValueError: For a number out of range.
    """

    name = "twin_merging"
    source: ClassVar[str] = "2406.15479"
    summary: ClassVar[str] = "per image, what separates the experts from the merged model, by a trained router"
    needs_bank: ClassVar[bool] = True
    for_views: ClassVar[bool] = False

    def __init__(
        self,
        *,
        rank: int | None = 16,
        targets: Targets = "mlp",
        ridge: float = 0.1,
        per_class: int = 256,
        steps: int = 300,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__(rank=rank, targets=targets, ridge=ridge)
        if per_class < 1 or steps < 0 or not lr > 0:
            raise ValueError(
                f"expected per_class of 1 or more, steps of 0 or more and lr above 0, got {per_class}, {steps} and {lr}"
            )
        self.per_class = per_class
        self.steps = steps
        self.lr = lr
        self.seed = seed

    @override
    def collect(self, end: TaskEnd) -> None:
        super().collect(end)
        del self.experts[end.task]  # they depend on the merged model

    @override
    def mixed(self, deployment: Deployment) -> tuple[State, list[Experts]]:
        frame, layers, experts = deployment.frame, self.layers(deployment.frame), []
        merged = {**frame.base, **deployment.merged}
        names = [
            f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias") if f"{layer}.{kind}" in frame.base
        ]
        for task in deployment.tasks:
            tau = deployment.vector(task)
            own = {name: frame.base[name] + tau[name] - merged[name] for name in names}
            experts.append(experts_of(own, layers, self.rank))
        return {name: merged[name] for name in names}, experts

    @override
    def chooser(self, tasks: Sequence[int]) -> FeatureRouter:
        means, covariance, _, owner = self.gaussians(tasks)
        generator = seeded_generator(seed=self.seed, task=len(tasks), name="router", purpose=self.name)
        dim = means.shape[1]
        noise = torch.randn(len(means), self.per_class, dim, generator=generator, dtype=covariance.dtype)
        root: Tensor = torch.linalg.cholesky(covariance)
        features = (means.double()[:, None] + noise @ root.T).flatten(0, 1).float()
        labels = owner.repeat_interleave(self.per_class)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
            router = MLPRouter(len(tasks), dim, 2 * dim)

        def loss(step: int) -> Tensor:
            chosen = torch.randint(len(labels), (256,), generator=generator)
            return functional.nll_loss(router(features[chosen]).clamp(min=1e-12).log(), labels[chosen])

        descend(loss, list(router.parameters()), steps=self.steps, lr=self.lr)
        return router

    @override
    def nbytes(self, frame: Frame, classes: Sequence[Sequence[int]]) -> int:
        statistics = sum(self.statistics_bytes(frame.feature_dim, len(own)) for own in classes)
        return statistics + sum(4 * tensor.numel() for tensor in frame.base.values()) * len(classes)
