"""Predictors of routed models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence, Set

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from clmerge.deploy.predictors import Compute, Place, Predictor, State
from clmerge.deploy.routing.routed_model import RoutedModel
from clmerge.deploy.routing.routers import FeatureRouter, Query


class Routed(Predictor):
    """A routed model; it needs no task.

    Args:
        model: The routed model, which is moved to the device of the images.
        head: The head that is copied at the beginning of every pass over images; default the model's own.
    """

    def __init__(self, model: RoutedModel, head: nn.Module | None = None) -> None:
        self.model = model
        self._head = head

    @override
    def prepare(self, place: Place) -> Set[str]:
        if self._head is not None:
            self.model.head = copy.deepcopy(self._head).eval()
        return set()

    @override
    def scores(self, compute: Compute, tasks: Tensor) -> Tensor:
        self.model.to(compute.images.device)
        found = self.logits(compute.images, tasks).float()
        self._note()
        return found

    def logits(self, images: Tensor, tasks: Tensor) -> Tensor:
        """Return the logits of images, ``(B, C)``."""
        found: Tensor = self.model(images)
        return found

    def _note(self) -> None:
        self.choices = self.model.tasks, self.model.choices()


class RoutedByTask(Routed):
    """The experts of a routed model, one-hot by the given task of every image: the oracle of its routers."""

    needs_task = True

    @override
    def knows(self, task: int) -> bool:
        return task in self.model.tasks

    @override
    def logits(self, images: Tensor, tasks: Tensor) -> Tensor:
        position = torch.zeros_like(tasks)
        for column, task in enumerate(self.model.tasks):
            position = torch.where(tasks == task, column, position)
        return self.model.answer(images, functional.one_hot(position, len(self.model.tasks)).to(images.dtype))

    @override
    def _note(self) -> None:
        """Note nothing: the oracle chooses no task."""


class RoutedViews(Predictor):
    """Views of a merger, one per task, of which a router chooses one for every image.

    Args:
        view: Returns the weights of a task by the module's names.
        tasks: Indices of the tasks, in the order of the gates.
        router: Gates by features of theta_0; the largest one counts.
        encoder: The backbone of theta_0.
    """

    def __init__(
        self, view: Callable[[int], State], tasks: Sequence[int], router: FeatureRouter, encoder: nn.Module
    ) -> None:
        self._view, self.tasks = view, tuple(tasks)
        self._router, self._encoder = router.eval(), encoder.eval()
        self._place: Place = lambda make: make()

    @override
    def prepare(self, place: Place) -> Set[str]:
        self._place = place
        return set(place(lambda: self._view(self.tasks[0])))

    @override
    def scores(self, compute: Compute, tasks: Tensor) -> Tensor:
        self._router.to(compute.images.device)
        self._encoder.to(compute.images.device)
        query = Query(compute.images, self._encoder, lambda images, gates: gates)
        chosen = self._router.gates(query).argmax(dim=1)
        found: Tensor | None = None
        # The whole batch is computed with every view that occurs: parts shared between predictors need equal inputs.
        for column in sorted(set(chosen.tolist())):
            view = self._place(lambda column=column: self._view(self.tasks[column]))  # type: ignore[misc]
            scores = compute(view)
            found = scores if found is None else torch.where((chosen == column).unsqueeze(1), scores, found)
        assert found is not None
        self.choices = self.tasks, functional.one_hot(chosen, len(self.tasks)).float()
        return found
