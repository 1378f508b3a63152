"""The routed models of a run: every merged model under every routing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clmerge.deploy.kept_state import load_states, states_of, take_of_rank_zero
from clmerge.deploy.predictors import PerTask, Predictor
from clmerge.deploy.routing.routed import RoutedViews
from clmerge.deploy.routing.routed_model import RoutedModel, dense_copy, put_state
from clmerge.deploy.routing.routing import PREFIX, Deployment, Frame, Routing, TaskEnd
from clmerge.deploy.running_merge import RunningMerge
from clmerge.merging import Merger
from clmerge.models import Classifier, TangentModule
from clmerge.models.tuning.adapters import AdapterLinear
from clmerge.statistics.measure import training_batches
from clmerge.streams import AdaptationBatch, AdaptationData, Stream, StreamDataModule
from clmerge.streams.splits import derived_seed
from clmerge.weights.parametrization import running_statistics
from clmerge.weights.task_vector import State


class RoutedModels:
    """Collect what the routings of a run keep, and build the routed models.

    A routed model depends on the task vectors, on what was collected, on the merged model and on the seed: it is built
    when it is needed, and a resumed run builds the same one.

    Args:
        routings: The routings, with different names.
        module: The classifier.
        data: Its data module.
        stream: The stream that it serves.
        adaptation: Images that routings learn on.
        num_images: Training images of every task that statistics are measured on.
        vector: Returns the stored task vector of a task.
        seed: Seed of the run.

    Attributes:
        seconds: Duration of the last collection and building of every routed model, by name.

    Raises:
        ValueError: If two routings have the same name, or one cannot route the classifier.
    """

    def __init__(
        self,
        routings: Sequence[Routing],
        module: Classifier,
        data: StreamDataModule,
        stream: Stream,
        *,
        adaptation: AdaptationData,
        num_images: int,
        vector: Callable[[int], State],
        seed: int,
    ) -> None:
        self.routings = {one.name: one for one in routings}
        if len(self.routings) < len(routings):
            raise ValueError(f"expected routings of different kinds, got {[one.name for one in routings]}")
        self.module, self.data, self.stream = module, data, stream
        self.adaptation, self.num_images, self.seed = adaptation, num_images, seed
        self._vector = vector
        self.seconds: dict[str, float] = {}
        self._collecting: dict[str, float] = {}
        self._built: tuple[list[int], dict[str, RoutedModel]] = ([], {})
        if not routings:
            return
        for part in module.backbone.modules():
            if isinstance(part, TangentModule | AdapterLinear):
                raise ValueError(
                    f"expected a backbone of ordinary layers for routings, got {type(part).__name__} of "
                    f"{module.tuning!r}: tune with Full, Partial, LoRA or IA3"
                )
        if statistics := running_statistics(module.backbone):
            raise ValueError(
                f"expected a backbone without running statistics for routings, got {next(iter(statistics))!r}: "
                "theta_0's features would change with those of every task"
            )
        for one in routings:
            if one.adapts:
                try:
                    adaptation.check(stream, labels=one.reads_labels)
                except ValueError as error:
                    raise ValueError(f"routing {one.name!r}: {error}") from error

    def __len__(self) -> int:
        return len(self.routings)

    def names(self, mergers: Mapping[str, Merger]) -> dict[str, dict[str, Routing]]:
        """Return merger -> routed model -> routing; some alone serve a merger with a view per task."""
        return routed_names(mergers, list(self.routings.values()))

    def check(self, parameters: State) -> None:
        """Refuse a network without layers to mix, before anything is trained.

        Args:
            parameters: The merged weights by name.

        Raises:
            ValueError: If there are none.
        """
        if self.routings:
            frame = self.frame(parameters, torch.device("cpu"))
            for one in self.routings.values():
                one.layers(frame)

    def frame(self, base: State, device: torch.device) -> Frame:
        """Return the network that routed models are built of.

        Args:
            base: theta_0 by the classifier's names.
            device: Where routers are trained.
        """
        return Frame(dense_copy(self.module.backbone), self.module.head, of_backbone(base), device)

    def collect(self, base: State, tau: State, task: int, device: torch.device) -> dict[str, int]:
        """Collect what the routings keep of a task that was just merged.

        Args:
            base: theta_0 by name.
            tau: The task vector by name.
            task: Index of the task.
            device: Device for the computation; the module stays there.

        Returns:
            Bytes of what is kept so far, by ``routing.NAME``.
        """
        self.module.to(device)
        frame = self.frame(base, device)
        for name, one in self.routings.items():
            started = time.perf_counter()
            seed = derived_seed(self.seed, "routing", name, task)
            images = partial(self._images, task)
            one.collect(TaskEnd(task, self._classes(task), of_backbone(tau), frame, images, seed))
            take_of_rank_zero(one)
            self._collecting[name] = time.perf_counter() - started
        return {f"routing.{name}": self.nbytes(name, frame, range(task + 1)) for name in self.routings}

    def nbytes(self, name: str, frame: Frame, tasks: Sequence[int]) -> int:
        """Return the bytes that a routing keeps of some tasks.

        Args:
            name: The routing.
            frame: The network.
            tasks: Indices of the tasks.
        """
        return self.routings[name].nbytes(frame, [self._classes(each) for each in tasks])

    def predictors(
        self, merge: RunningMerge, names: Iterable[str], tasks: Sequence[int], device: torch.device
    ) -> dict[str, Predictor]:
        """Return the predictors of routed models.

        Args:
            merge: The merged models.
            names: ``MERGER+NAME`` of each.
            tasks: Indices of the merged tasks, in order.
            device: Device for the computation.
        """
        if self._built[0] != list(tasks):
            self._built = (list(tasks), {})
        found: dict[str, Predictor] = {}
        for name in names:
            label, _, kind = name.rpartition("+")
            one = self.routings[kind]
            started = time.perf_counter()
            if merge.mergers[label].task_views:
                found[name] = views_of(one, merge, label, self.module)
            else:
                found[name] = one.predictor(self._model(name, merge, tasks, device), self.module.head)
            self.seconds[name] = self._collecting.get(kind, 0.0) + time.perf_counter() - started
        return found

    def final(self, merge: RunningMerge, tasks: Sequence[int], device: torch.device) -> dict[str, RoutedModel]:
        """Return the routed models that are one file each: all but those that choose among views.

        Args:
            merge: The merged models.
            tasks: Indices of the merged tasks, in order.
            device: Device for the computation.
        """
        wanted = [
            name
            for label, found in self.names(merge.mergers).items()
            if not merge.mergers[label].task_views
            for name in found
        ]
        self.predictors(merge, wanted, tasks, device)
        return {name: self._built[1][name] for name in wanted}

    def _model(self, name: str, merge: RunningMerge, tasks: Sequence[int], device: torch.device) -> RoutedModel:
        if name not in self._built[1]:
            label, _, kind = name.rpartition("+")
            one = self.routings[kind]
            merged = of_backbone(merge.merged_state(label))
            self._built[1][name] = one.build(self._deployment(one, merge, merged, tasks, device)).cpu()
        return self._built[1][name]

    def _deployment(
        self, one: Routing, merge: RunningMerge, merged: State, tasks: Sequence[int], device: torch.device
    ) -> Deployment:
        seed = derived_seed(self.seed, "routing", one.name, "gates", *tasks)
        return Deployment(
            tasks=tasks,
            classes=[self._classes(task) for task in tasks],
            num_classes=len(self.stream.class_names),
            merged=merged,
            frame=self.frame(merge.base, device),
            vector=lambda task: of_backbone(self._vector(task)),
            batches=partial(self._rounds, tasks, seed),
            seed=seed,
        )

    def _rounds(self, tasks: Sequence[int], seed: int) -> Iterator[list[AdaptationBatch]]:
        number = len(self.adaptation.images(self.data, tasks))
        batches = self.adaptation.batches(self.data, tasks, seed=seed)
        while True:
            yield [next(batches) for _ in range(number)]

    def _images(self, task: int) -> Any:
        for images, labels, *_ in training_batches(self.data, task, self.num_images, self.seed):
            yield images, labels

    def _classes(self, task: int) -> list[int]:
        return list(self.stream.tasks[task].classes)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run: tensors and primitives."""
        return states_of(self.routings)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by ``state_dict``.

        Raises:
            RuntimeError: If the state belongs to other routings.
        """
        load_states(self.routings, state, "routings")


def routed_names(mergers: Mapping[str, Merger], routings: Sequence[Routing]) -> dict[str, dict[str, Routing]]:
    """Return merger -> routed model -> routing; some alone serve a merger with a view per task."""
    return {
        name: {f"{name}+{one.name}": one for one in routings if one.for_views or not merger.task_views}
        for name, merger in mergers.items()
    }


def views_of(routing: Routing, merge: RunningMerge, label: str, module: Classifier) -> RoutedViews:
    """Return the predictor that chooses among the views of a merger.

    Args:
        routing: A routing with ``for_views``, with all tasks collected.
        merge: The merged models.
        label: Name of the merger.
        module: The classifier.
    """
    views = merge.predictor(label, module)
    assert isinstance(views, PerTask)
    router = routing.chooser(views.tasks)
    take_of_rank_zero(router)
    encoder = dense_copy(module.backbone)
    put_state(encoder, of_backbone(merge.base))
    return RoutedViews(views.view, views.tasks, router, encoder)


def of_backbone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the backbone by its own names."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
