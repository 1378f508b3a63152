"""A classifier with small adapters behind its features and blocks, one set for every task."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from clmerge.deploy.predictors import Compute, Place, Predictor
from clmerge.deploy.routing.routers import cosines
from clmerge.models import Classifier, Head
from clmerge.weights.swap import assign, named_tensors
from clmerge.weights.task_vector import State

M = TypeVar("M", bound=Classifier)

FEATURES = ""  # the place behind the backbone
_PREFIX, _CENTROIDS = "surgery.", "surgery.centroids"


class Adapters(nn.Module):
    """Take ``up relu(down z)`` away from ``z``, with the matrices of every image's own task.

    Args:
        down: ``(T, r, D)``.
        up: ``(T, D, r)``; zeros change nothing.

    Example:
        >>> one = Adapters(torch.ones(2, 1, 1), torch.tensor([[[0.0]], [[0.5]]]))
        >>> one(torch.tensor([[2.0], [2.0]]), torch.tensor([0, 1])).flatten().detach()
        tensor([2., 1.])
    """

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    @override
    def forward(self, z: Tensor, tasks: Tensor) -> Tensor:
        """Return features ``(B, D)``, or those of tokens ``(B, N, D)``.

        Args:
            z: The features.
            tasks: Position of the task of every image, ``(B,)``.
        """
        hidden = functional.relu(torch.einsum("b...d,brd->b...r", z, self.down[tasks]))
        return z - torch.einsum("b...r,bdr->b...d", hidden, self.up[tasks])


class Operated(nn.Module):
    """A classifier whose features are corrected by the adapters of one task for every image.

    Args:
        classifier: The classifier; it is not changed, but called.
        places: Adapters by path of a block below the backbone, whose tokens they correct, or ``FEATURES``.
        centroids: Directions of the tasks' features, ``(T, D)``, of which the nearest one gives the task of an image;
            none if the tasks must be given.
    """

    def __init__(self, classifier: Classifier, places: Mapping[str, Adapters], centroids: Tensor | None = None) -> None:
        super().__init__()
        self.classifier = classifier
        self.centroids: Tensor | None
        self.register_buffer("centroids", centroids)
        self._final = places.get(FEATURES)
        self._places = {place: adapters for place, adapters in places.items() if place != FEATURES}
        self.adapters = nn.ModuleList(places.values())
        self.chosen: Tensor | None = None

    @override
    def forward(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        """Return logits ``(B, C)``.

        Args:
            images: ``(B, 3, H, W)``.
            tasks: Position of the task of every image, ``(B,)``; only without centroids.
        """
        backbone = self.classifier.backbone
        plain: Tensor | None = None
        if self.centroids is not None:
            plain = backbone(images)
            tasks = cosines(plain.float(), self.centroids).argmax(dim=1)
        assert tasks is not None
        self.chosen = tasks
        if self._places or plain is None:
            with behind_blocks(backbone, self._places, lambda place, z: self._places[place](z, tasks)):
                plain = backbone(images)
        logits: Tensor = self.classifier.head(plain if self._final is None else self._final(plain, tasks))
        return logits


def blocks_of(backbone: nn.Module) -> list[str]:
    """Return the paths of a backbone's blocks: the members of its image tower's largest list of modules, if alike.

    Args:
        backbone: A ``Backbone``.
    """
    tower = backbone.get_submodule(f"model.{encoder}" if (encoder := getattr(backbone, "encoder", "")) else "model")
    prefix = f"model.{encoder}." if encoder else "model."
    lists = {
        name: part
        for name, part in tower.named_modules()
        if isinstance(part, (nn.ModuleList, nn.Sequential)) and len(part) > 1
    }
    if not lists:
        return []
    largest = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    if len({type(block) for block in lists[largest]}) > 1:
        return []
    return [f"{prefix}{largest}.{index}" for index in range(len(lists[largest]))]


@contextmanager
def behind_blocks(backbone: nn.Module, places: Sequence[str] | Mapping[str, Any], act: Any) -> Iterator[None]:
    """Replace the outputs of blocks by what ``act(place, output)`` returns, if anything, inside of the context."""

    def behind(place: str, _: nn.Module, args: Any, output: Any) -> Any:
        return act(place, output)

    handles = [backbone.get_submodule(place).register_forward_hook(partial(behind, place)) for place in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def to_tensors(places: Mapping[str, Adapters], centroids: Tensor | None) -> dict[str, Tensor]:
    """Return adapters and centroids by names that no module has."""
    found = {}
    for place, adapters in places.items():
        for name, tensor in (("down", adapters.down), ("up", adapters.up)):
            found[f"{_PREFIX}{place}.{name}"] = tensor.detach()
    return found if centroids is None else {**found, _CENTROIDS: centroids}


def split_state(state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of the classifier, and those of ``to_tensors``."""
    own = {name: tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
    return {name: tensor for name, tensor in state.items() if name not in own}, own


def copy_with(module: M, state: State) -> M:
    """Return a copy of a classifier with the tensors of a state that are its own."""
    # The state of regularizers is not needed here and may be larger than the model.
    regularizers = getattr(module, "regularizers", None)
    twin = copy.deepcopy(module, {} if regularizers is None else {id(regularizers): nn.ModuleList()})
    own = split_state(state)[0]
    assign(named_tensors(twin, own, origin="a merged model"), own)
    return twin


def from_tensors(classifier: Classifier, tensors: State) -> Operated:
    """Return the classifier with the adapters and centroids of ``to_tensors``.

    Args:
        classifier: The classifier with the merged weights.
        tensors: The tensors.
    """
    stems = dict.fromkeys(name.rpartition(".")[0] for name in tensors if name != _CENTROIDS)
    places = {
        stem.removeprefix(_PREFIX.removesuffix(".")).removeprefix("."): Adapters(
            tensors[f"{stem}.down"].clone(), tensors[f"{stem}.up"].clone()
        )
        for stem in stems
    }
    centroids = tensors.get(_CENTROIDS)
    return Operated(classifier, places, None if centroids is None else centroids.clone())


class Surgical(Predictor):
    """An ``Operated`` classifier as a predictor.

    Args:
        model: The classifier with its adapters.
        head: The head that is copied at the beginning of every pass over images; default the model's own.
    """

    def __init__(self, model: Operated, head: Head | None = None) -> None:
        self._head = head
        self.model = model.eval().requires_grad_(False)
        self.needs_task = model.centroids is None
        self._tasks = range(len(next(iter(model.adapters.parameters()))))

    @override
    def knows(self, task: int) -> bool:
        return not self.needs_task or task in self._tasks

    @override
    def prepare(self, place: Place) -> Set[str]:
        if self._head is not None:
            self.model.classifier.head = copy.deepcopy(self._head).eval()
        return set()

    @override
    def scores(self, compute: Compute, tasks: Tensor) -> Tensor:
        self.model.to(compute.images.device)
        if self.needs_task:
            given = tasks.to(compute.images.device).clamp(max=len(self._tasks) - 1)  # what is unknown is not counted
            found: Tensor = self.model(compute.images, given)
        else:
            found = self.model(compute.images)
            assert self.model.chosen is not None
            self.choices = self._tasks, functional.one_hot(self.model.chosen, len(self._tasks)).float()
        return found.float()
