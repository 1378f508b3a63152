"""Routers: from what is seen of an image to the weights of the tasks, never averaged over a batch."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override


class Query:
    """What a router may ask of a batch of images.

    Args:
        images: ``(B, channels, height, width)``.
        encode: Returns the features of theta_0, ``(B, D)``.
        answer: Returns the logits ``(B, C)`` under gates ``(B, T)``.
    """

    def __init__(
        self, images: Tensor, encode: Callable[[Tensor], Tensor], answer: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self.images = images
        self._encode, self._answer = encode, answer

    @property
    def features(self) -> Tensor:
        """Features of theta_0, ``(B, D)``."""
        return self._encode(self.images)

    def logits(self, gates: Tensor) -> Tensor:
        """Return the logits ``(B, C)`` under gates ``(B, T)``: one pass through the model.

        Args:
            gates: Weights of the tasks.
        """
        return self._answer(self.images, gates)


class Router(nn.Module, ABC):
    """Weights of the tasks for every image: ``(B, T)``.

    All state is parameters and buffers whose shapes follow from the constructor's arguments, which are plain numbers
    and stored under their own names: so a saved router is built again by name.

    Attributes:
        needs_features: Whether it looks at features of theta_0, for which the routed model keeps theta_0's encoder.
    """

    needs_features: bool = False

    def spec(self) -> dict[str, Any]:
        """Return class and arguments, in JSON types."""
        return {
            "class": type(self).__name__,
            "settings": {name: getattr(self, name) for name in inspect.signature(type(self)).parameters},
        }

    @abstractmethod
    def gates(self, query: Query) -> Tensor:
        """Return the gates of the images of a query, ``(B, T)``."""


class LayerRouter(nn.Module, ABC):
    """Weights of the tasks for one layer, from what the layer reads; saved as a ``Router`` is."""

    def spec(self) -> dict[str, Any]:
        """Return class and arguments, in JSON types."""
        return Router.spec(self)  # type: ignore[arg-type]

    @abstractmethod
    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        """Return gates ``(B, T)``, or ``(B, ..., T)`` where every token has its own.

        Args:
            x: Input of the layer, ``(B, ..., in)``.
            read: ``A_t x`` for every expert, ``(B, ..., T, r)``.
        """


class FeatureRouter(Router):
    """A router that looks at features of theta_0, which no later task moves."""

    needs_features = True

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Return gates ``(B, T)`` for features ``(B, D)``."""

    @override
    def gates(self, query: Query) -> Tensor:
        own = next(tensor for tensor in (*self.parameters(), *self.buffers()) if tensor.is_floating_point())
        found: Tensor = self(query.features.to(own.dtype))
        return found


class FixedRouter(Router):
    """The same gates for every image.

    Args:
        num_tasks: Number of tasks.
    """

    weights: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.register_buffer("weights", torch.full((num_tasks,), 1.0 / max(1, num_tasks)))

    @override
    def gates(self, query: Query) -> Tensor:
        return self.weights.expand(query.images.shape[0], -1)


class CentroidRouter(FeatureRouter):
    """Softmax over the nearest centroids of the tasks' features (DAM, arXiv 2403.08755).

    Args:
        num_tasks: Number of tasks.
        dim: Number of features.
        top_k: How many of the nearest tasks get a weight; 2 in DAM's code, 1 is the nearest task alone.
        temperature: Divides the cosines; none gives the nearest tasks equal weights.

    Example:
        >>> router = CentroidRouter(2, 2)
        >>> router.centroids.copy_(torch.tensor([[0.96, 0.28], [0.936, 0.352]]))
        tensor([[0.9600, 0.2800],
                [0.9360, 0.3520]])
        >>> router(torch.tensor([[2.0, 0.0]]))
        tensor([[0.9168, 0.0832]])
    """

    centroids: Tensor

    def __init__(self, num_tasks: int, dim: int, top_k: int = 2, temperature: float | None = 0.01) -> None:
        super().__init__()
        self.num_tasks, self.dim, self.top_k, self.temperature = num_tasks, dim, top_k, temperature
        self.register_buffer("centroids", torch.zeros(num_tasks, dim))

    @override
    def forward(self, features: Tensor) -> Tensor:
        near = cosines(features, self.centroids)
        nearest = near.topk(min(self.top_k, self.num_tasks), dim=-1)
        if self.temperature is None:
            weights = torch.full_like(nearest.values, 1.0 / nearest.values.shape[-1])
        else:
            weights = (nearest.values / self.temperature).softmax(dim=-1)
        return torch.zeros_like(near).scatter(-1, nearest.indices, weights)


def cosines(features: Tensor, centroids: Tensor) -> Tensor:
    """Return the cosines of features ``(B, D)`` with centroids ``(T, D)``, ``(B, T)``."""
    found: Tensor = functional.normalize(features, dim=-1) @ functional.normalize(centroids, dim=-1).T
    return found


class GaussianRouter(FeatureRouter):
    """Posterior of the tasks: one Gaussian of features per class, all with one covariance.

    ``p(t | x)`` is proportional to the sum over the task's classes of ``n_c exp(-d_c(x) / 2)``, with the number of
    images and the Mahalanobis distance of the class. As the covariance is one, a linear map of the features gives the
    exponents up to a constant.

    Args:
        num_tasks: Number of tasks.
        num_gaussians: Number of classes of all tasks; a class of two tasks counts twice.
        dim: Number of features.
    """

    weight: Tensor
    bias: Tensor
    tasks: Tensor

    def __init__(self, num_tasks: int, num_gaussians: int, dim: int) -> None:
        super().__init__()
        self.num_tasks, self.num_gaussians, self.dim = num_tasks, num_gaussians, dim
        self.register_buffer("weight", torch.zeros(num_gaussians, dim))
        self.register_buffer("bias", torch.zeros(num_gaussians))
        self.register_buffer("tasks", torch.zeros(num_gaussians, dtype=torch.long))

    def fit(self, means: Tensor, counts: Tensor, tasks: Tensor, covariance: Tensor) -> Self:
        """Set the Gaussians.

        Args:
            means: ``(num_gaussians, dim)``.
            counts: Number of images of each, ``(num_gaussians,)``.
            tasks: Index of the task of each, ``(num_gaussians,)``.
            covariance: ``(dim, dim)``, positive definite.
        """
        weight = torch.linalg.solve(covariance.double(), means.double().T).T
        self.weight.copy_(weight)
        self.bias.copy_(counts.double().log() - 0.5 * (weight * means.double()).sum(dim=1))
        self.tasks.copy_(tasks)
        return self

    @override
    def forward(self, features: Tensor) -> Tensor:
        posterior = functional.linear(features, self.weight, self.bias).softmax(dim=-1)
        owner = functional.one_hot(self.tasks, self.num_tasks).to(posterior.dtype)
        return posterior @ owner


class MLPRouter(FeatureRouter):
    """Softmax of a small network of the normalised features, trained to tell tasks apart (arXiv 2406.15479).

    Args:
        num_tasks: Number of tasks.
        dim: Number of features.
        hidden: Width of the two hidden layers.
    """

    def __init__(self, num_tasks: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.num_tasks, self.dim, self.hidden = num_tasks, dim, hidden
        first = (nn.Linear(dim, hidden), nn.LeakyReLU(), nn.Linear(hidden, hidden), nn.LeakyReLU())
        self.layers = nn.Sequential(*first, nn.Linear(hidden, num_tasks))

    @override
    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.layers(functional.normalize(features, dim=-1) * self.dim**0.5)
        return found.softmax(dim=-1)


class ConfidenceRouter(Router):
    """Posterior of the tasks by how sure each expert is (Branch-Train-Merge, arXiv 2208.03306): T passes per batch.

    ``p(t | x)`` is proportional to ``prior_t c_t(x)``; the likelihood, which an image does not have, is replaced by the
    probability that expert t gives to the classes of its own task, among all classes seen.

    Args:
        num_tasks: Number of tasks.
        num_classes: Number of classes of the stream.
    """

    prior: Tensor
    owned: Tensor

    def __init__(self, num_tasks: int, num_classes: int) -> None:
        super().__init__()
        self.num_tasks, self.num_classes = num_tasks, num_classes
        self.register_buffer("prior", torch.full((num_tasks,), 1.0 / max(1, num_tasks)))
        self.register_buffer("owned", torch.zeros(num_tasks, num_classes))

    @override
    def gates(self, query: Query) -> Tensor:
        seen = self.owned.sum(dim=0) > 0
        experts = torch.eye(self.num_tasks, device=self.prior.device, dtype=self.prior.dtype)
        found = []
        for task in range(self.num_tasks):
            logits = query.logits(experts[task].expand(query.images.shape[0], -1))
            probabilities = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)
            found.append(probabilities @ self.owned[task].to(probabilities.dtype))
        return posterior(torch.stack(found, dim=-1), self.prior)


def posterior(likelihoods: Tensor, prior: Tensor) -> Tensor:
    """Return the posterior of the tasks, ``(B, T)``.

    Args:
        likelihoods: ``(B, T)``, not negative.
        prior: ``(T,)``.

    Example:
        >>> posterior(torch.tensor([[0.2, 0.05]]), torch.tensor([0.5, 0.5]))
        tensor([[0.8000, 0.2000]])
    """
    joint = likelihoods * prior.to(likelihoods.dtype)
    return joint / joint.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(joint.dtype).tiny)


class SubspaceRouter(LayerRouter):
    """Softmax of how much of a token lies in the subspace that each expert reads (SMILE, arXiv 2408.10174).

    ``logit_t = || V_t x ||`` with the first ``gate_k`` right singular vectors of the expert. They are the normalised
    first rows of its factor A, of which only the lengths are kept here.

    Args:
        num_tasks: Number of tasks.
        gate_k: Singular vectors of each expert that are looked at.
        top_k: Experts that are used per token; their weights are normalised again.
    """

    lengths: Tensor

    def __init__(self, num_tasks: int, gate_k: int, top_k: int = 1) -> None:
        super().__init__()
        self.num_tasks, self.gate_k, self.top_k = num_tasks, gate_k, top_k
        self.register_buffer("lengths", torch.ones(num_tasks, gate_k))

    def fit(self, a: Tensor) -> Self:
        """Take the lengths of the first rows of the factors A, ``(T, r, in)``, whose rows are orthogonal."""
        self.lengths.copy_(a[:, : self.gate_k].norm(dim=-1))
        return self

    @override
    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        # A direction of length zero is none: it reads zero.
        lengths = torch.where(self.lengths > 0, self.lengths, 1.0)
        shares = read[..., : self.gate_k].to(lengths.dtype) / lengths
        probabilities = shares.square().sum(dim=-1).sqrt().softmax(dim=-1)
        if self.top_k >= self.num_tasks:
            return probabilities
        best = probabilities.topk(self.top_k, dim=-1)
        weights = best.values / best.values.sum(dim=-1, keepdim=True)
        return torch.zeros_like(probabilities).scatter(-1, best.indices, weights)


class LinearGate(LayerRouter):
    """Gates without softmax, linear in the mean over an image's tokens (MINGLE, arXiv 2505.11883).

    Args:
        num_tasks: Number of tasks.
        width: Number of inputs of the layer.
    """

    def __init__(self, num_tasks: int, width: int) -> None:
        super().__init__()
        self.num_tasks, self.width = num_tasks, width
        self.layer = nn.Linear(width, num_tasks)

    @override
    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        found: Tensor = self.layer(mean_token(x).to(self.layer.weight.dtype))
        return found


class MLPGate(LayerRouter):
    """Gates without softmax: the mean over tokens of a network of one hidden layer (WEMoE, arXiv 2402.00433).

    Args:
        num_tasks: Number of tasks.
        width: Number of inputs of the layer, and of hidden units.
    """

    def __init__(self, num_tasks: int, width: int) -> None:
        super().__init__()
        self.num_tasks, self.width = num_tasks, width
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_tasks))

    @override
    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        return mean_token(self.layers(x.to(next(self.parameters()).dtype)))


class PreferenceGate(LayerRouter):
    """Gates of a module that depend on a preference among the tasks, not on the image (PWE-MoE, arXiv 2406.09770).

    Args:
        num_tasks: Number of tasks.
    """

    preference: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.layers = nn.Sequential(nn.Linear(num_tasks, 2 * num_tasks), nn.ReLU(), nn.Linear(2 * num_tasks, num_tasks))
        self.register_buffer("preference", torch.full((num_tasks,), 1.0 / max(1, num_tasks)))

    @override
    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        found: Tensor = self.layers(self.preference)
        return found.expand(x.shape[0], -1)


def mean_token(x: Tensor) -> Tensor:
    """Return the mean over all dimensions between the first and the last, ``(B, width)``."""
    return x if x.ndim == 2 else x.flatten(1, -2).mean(dim=1)


def router_of(spec: dict[str, Any], where: str) -> Router | LayerRouter:
    """Return a new router of a class that is imported, by the result of ``spec``.

    Args:
        spec: Class and arguments.
        where: The file, for messages.

    Raises:
        ValueError: If there is no such class, or it takes other arguments.
    """
    known: dict[str, type] = {}
    pending: list[type] = [Router, LayerRouter]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        known[kind.__name__] = kind
    name = str(spec.get("class"))
    if name not in known or inspect.isabstract(known[name]):
        raise ValueError(
            f"expected a router that is imported, for {where}, got {name!r}; import the module that defines it first"
        )
    try:
        found: Router | LayerRouter = known[name](**spec["settings"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"expected the settings of {name} in {where}, got others: {error}") from error
    return found
