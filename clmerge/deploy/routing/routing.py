"""The interface of routings: what is kept of every task, and the routed model that is built from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from clmerge.deploy.kept_state import take_of_rank_zero
from clmerge.deploy.routing.experts import Expert, Experts, Targets, experts_of, mixed_layers, put_mixtures
from clmerge.deploy.routing.mixture import Gates
from clmerge.deploy.routing.routed import Routed
from clmerge.deploy.routing.routed_model import RoutedModel, dense_copy, put_state
from clmerge.deploy.routing.routers import FeatureRouter, Router
from clmerge.distributed import of_rank_zero
from clmerge.merging.checks import checked_choice
from clmerge.settings import Configured
from clmerge.weights.task_vector import State, TaskVector

if TYPE_CHECKING:
    from clmerge.models.heads import Head
    from clmerge.streams.adaptation import AdaptationBatch, AdaptationData

PREFIX = "backbone."  # of the classifier's names before those of the backbone


@dataclass(frozen=True)
class Frame:
    """The network that routed models are built of.

    Attributes:
        backbone: A backbone with ordinary layers; its tensors are shared with the run's.
        head: The head of the classes seen so far.
        base: theta_0 by the backbone's names.
        device: Where routers are trained and images are encoded.
    """

    backbone: nn.Module
    head: Head
    base: State
    device: torch.device

    @property
    def feature_dim(self) -> int:
        """Number of features per image."""
        found: Any = self.backbone.feature_dim
        return int(found)

    def model(self, state: State) -> nn.Module:
        """Return a backbone with other weights; tensors that are not given are shared.

        Args:
            state: Weights by the backbone's names.
        """
        found = dense_copy(self.backbone)
        put_state(found, state)
        return found


@dataclass(frozen=True)
class TaskEnd:
    """What is at hand when a task has ended, and gone later.

    Attributes:
        task: Index of the task.
        classes: Global ids of its classes.
        tau: Its task vector, by the backbone's names.
        frame: The network.
        images: Returns batches of its training images with labels, the same ones at every call.
        seed: Seed of everything random.
    """

    task: int
    classes: Sequence[int]
    tau: State
    frame: Frame
    images: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    seed: int

    @torch.no_grad()
    def features(self) -> tuple[Tensor, Tensor]:
        """Return features of theta_0 ``(N, D)``, float64 on the CPU, and labels ``(N,)`` of the task's images."""
        encoder = self.encoder()
        found = [(encoder(images.to(self.frame.device)).double().cpu(), labels) for images, labels in self.images()]
        return torch.cat([features for features, _ in found]), torch.cat([labels for _, labels in found])

    def encoder(self) -> nn.Module:
        """Return the backbone of theta_0, on the device."""
        return self.frame.model(self.frame.base).to(self.frame.device)


@dataclass(frozen=True)
class Deployment:
    """What a routed model is built from beside what was collected.

    Attributes:
        tasks: Indices of the tasks so far, in the order of the gates.
        classes: Global class ids of every one of them.
        num_classes: Number of classes of the stream.
        merged: Merged weights and running statistics by the backbone's names.
        frame: The network.
        vector: Returns the task vector of a task by the backbone's names.
        batches: Returns rounds of the run's adaptation images without end, a batch of each task in every round.
        seed: Seed of everything random.
    """

    tasks: Sequence[int]
    classes: Sequence[Sequence[int]]
    num_classes: int
    merged: State
    frame: Frame
    vector: Callable[[int], TaskVector]
    batches: Callable[[], Iterator[list[AdaptationBatch]]]
    seed: int


class Routing(Configured, ABC):
    """Mix low-rank experts of the tasks for every image, around a merged model: evaluated as ``MERGER+NAME``.

    The experts are the leading singular triplets of the task vectors in the mixed layers, whose own weights stay
    theta_0's; all other weights are the merger's. Nothing is ever averaged over a batch: the logits of an image are the
    same alone and in any batch. Experts and what a router keeps of a task never depend on other tasks, unless a routing
    says so: they are exact online and in any order.

    Args:
        rank: Singular triplets per layer and task; none for all of them.
        targets: Layers that are mixed: those of MLPs (``mlp``), or every ``linear`` layer. The packed projections of
            ``nn.MultiheadAttention``, as in open_clip's own towers, stay the merger's.

    Attributes:
        source: arXiv id of its paper.
        summary: One line that says how gates are found.
        needs_bank: Whether all task vectors are read again after every task.
        for_views: Whether it may choose among the views of a merger that has one per task.
        adapts: Whether it learns on the run's adaptation data when a model is built.
        reads_labels: Whether it reads the labels of these images.
        predictor_class: How its models answer.

    Raises:
        ValueError: For a rank below 1 or unknown targets.
    """

    source: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    needs_bank: ClassVar[bool] = False
    for_views: ClassVar[bool] = False
    adapts: ClassVar[bool] = False
    reads_labels: ClassVar[bool] = False
    predictor_class: ClassVar[type[Routed]] = Routed

    def __init__(self, *, rank: int | None = 16, targets: Targets = "mlp") -> None:
        if rank is not None and rank < 1:
            raise ValueError(f"expected a rank of 1 or more, got {rank}")
        self.rank = rank
        self.targets: Targets = checked_choice("targets", targets, Targets)
        self.experts: dict[int, Experts] = {}

    @property
    def data(self) -> str:
        """The images that it looks at beside the training of each task and the run's adaptation data."""
        return "none"

    def told(self, adaptation: AdaptationData | None) -> str:
        """Return the images that it looks at, given the adaptation data of the run, as results name them."""
        if not self.adapts or adaptation is None:
            return self.data
        return adaptation.told(labels=self.reads_labels)

    def layers(self, frame: Frame) -> list[str]:
        """Return the names of the mixed layers.

        Raises:
            ValueError: If the network has none.
        """
        return mixed_layers(frame.backbone, self.targets, frame.base)

    def collect(self, end: TaskEnd) -> None:
        """Keep of a task what later models need.

        Args:
            end: What is at hand.
        """
        self.experts[end.task] = experts_of(end.tau, self.layers(end.frame), self.rank)

    def build(self, deployment: Deployment) -> RoutedModel:
        """Return the routed model of the tasks so far.

        Args:
            deployment: What it is built from.
        """
        frame = deployment.frame
        base, experts = self.mixed(deployment)
        experts = of_rank_zero(experts)  # singular vectors of two processes may differ, even in sign
        gates = self.gates(experts, deployment)
        backbone = frame.model(deployment.merged)
        put_mixtures(backbone, base, experts, gates)
        router = self.router(deployment)
        if router is not None:
            take_of_rank_zero(router)
        encoder = frame.model(frame.base) if router is not None and router.needs_features else None
        model = RoutedModel(backbone, frame.head, tasks=deployment.tasks, router=router, encoder=encoder)
        self.learn(model, deployment)
        return model

    def mixed(self, deployment: Deployment) -> tuple[State, list[Experts]]:
        """Return the weights of the mixed layers beside the experts, and the experts of every task.

        Args:
            deployment: What the model is built from.
        """
        return deployment.frame.base, [self.experts[task] for task in deployment.tasks]

    def learn(self, model: RoutedModel, deployment: Deployment) -> None:
        """Train the gates of a model, in place; by default they are not trained.

        Args:
            model: The model.
            deployment: What it is built from.
        """

    def gates(self, experts: Sequence[Experts], deployment: Deployment) -> dict[str, Gates]:
        """Return the gates of every mixed layer; by default one for all of them, which ``router`` sets.

        Args:
            experts: Experts of every task.
            deployment: What the model is built from.
        """
        return dict.fromkeys(experts[0], Gates())

    @abstractmethod
    def router(self, deployment: Deployment) -> Router | None:
        """Return the router of the whole model; None if its layers have routers of their own.

        Args:
            deployment: What the model is built from.
        """

    def chooser(self, tasks: Sequence[int]) -> FeatureRouter:
        """Return the router by theta_0's features that chooses among the views of a merger; see ``for_views``.

        Args:
            tasks: Indices of the tasks, in the order of the gates.
        """
        raise NotImplementedError(f"{type(self).__name__} does not choose among views")

    def predictor(self, model: RoutedModel, head: nn.Module | None) -> Routed:
        """Return the predictor of a model.

        Args:
            model: The routed model.
            head: The head that is copied at the beginning of every pass over images; default the model's own.
        """
        return self.predictor_class(model, head)

    def nbytes(self, frame: Frame, classes: Sequence[Sequence[int]]) -> int:
        """Return the bytes of what is kept of some tasks; nothing that was collected is needed for it.

        Args:
            frame: The network.
            classes: Classes of every one of the tasks.
        """
        found = 0
        for layer in self.layers(frame):
            weight = frame.base[f"{layer}.weight"]
            rank = min(self.rank or min(weight.shape), *weight.shape)
            found += rank * sum(weight.shape) + (len(weight) if f"{layer}.bias" in frame.base else 0)
        return 4 * found * len(classes)

    def state_dict(self) -> dict[str, Any]:
        """Return what was collected, for a resumed run: tensors and primitives."""
        return {
            "experts": {
                task: {layer: one.state_dict() for layer, one in experts.items()}
                for task, experts in self.experts.items()
            }
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by ``state_dict``."""
        self.experts = {
            int(task): {layer: Expert.from_state(one) for layer, one in experts.items()}
            for task, experts in state["experts"].items()
        }


def predictor_of(model: RoutedModel, routing: Mapping[str, Any] | None) -> Routed:
    """Return the predictor of a routed model that was loaded from a file.

    Args:
        model: The model.
        routing: Class and settings of its routing, as its file says.
    """
    name = "" if routing is None else str(routing.get("class_path")).rpartition(".")[2]
    pending = Routing.__subclasses__()
    while pending:
        kind = pending.pop()
        if kind.__name__ == name:
            return kind.predictor_class(model)
        pending += kind.__subclasses__()
    return Routed(model)
