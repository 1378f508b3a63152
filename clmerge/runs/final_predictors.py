"""The models of a finished run after its last task, as predictors of its classifier."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clmerge.deploy.calibration.operated import Surgical, copy_with, from_tensors
from clmerge.deploy.naming import by_class
from clmerge.deploy.predictors import Merged, Predictor
from clmerge.deploy.routing.routed_model import dense_copy, load_routed
from clmerge.deploy.routing.routed_models import views_of
from clmerge.deploy.routing.routing import Routing
from clmerge.deploy.running_merge import RunningMerge
from clmerge.merging import Merger
from clmerge.models import Classifier
from clmerge.names import did_you_mean
from clmerge.results.results import ADAPTERS, EXPERT, HEAD, ZERO_SHOT, Results
from clmerge.results.run_folder import RunFolder
from clmerge.weights import TaskVectorBank, apply_task_vector, load_tensors
from clmerge.weights.parametrization import own_names, parametrized, state_of
from clmerge.weights.swap import swapped

PREFIX = "backbone.model."  # of the classifier's names before those of the files in model/


class FinalPredictors:
    """Build the predictor of any model of a finished run from its committed state; no image is read.

    Args:
        folder: The run folder; nothing in it is changed.
        mergers: The run's mergers by name, with no task folded in.
        buffers: Which running statistics merged models use, as in ``learner.buffers``.
        statistics: Running statistics of the model before the first task, by dense name.
        routings: The run's routings by name, with nothing collected.

    Attributes:
        names: Names of the models, as in the run's results.

    Raises:
        ValueError: If the run is not finished.
    """

    def __init__(
        self,
        folder: RunFolder,
        mergers: Mapping[str, Merger],
        *,
        buffers: Any,
        statistics: Mapping[str, Tensor],
        routings: Sequence[Routing] = (),
    ) -> None:
        if not folder.manifest.finished:
            raise ValueError(f"expected a finished run, got {folder.path}: `clmerge fit --resume {folder.path}` first")
        self._folder, self._mergers = folder, dict(mergers)
        self._buffers, self._statistics = buffers, statistics
        self._routings = {one.name: one for one in routings}
        self.names = Results.from_dict(folder.manifest.results).models

    @cached_property
    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self._folder.load_state()

    @cached_property
    def _merge(self) -> RunningMerge:
        state = self._state[1]
        merge = RunningMerge(
            self._mergers,
            base=state["base"],
            buffers=self._buffers,
            images=lambda module: (),  # what was estimated is in the state
            score=lambda module: 0.0,  # nothing is folded in any more
            losses=lambda model, request: iter(()),
            bank=TaskVectorBank(self._folder.bank),
        )
        merge.load_accumulators(state)
        return merge

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._folder.path

    @property
    def base(self) -> dict[str, Tensor]:
        """theta_0 of what was merged, dense, by name; empty if the backbone was frozen."""
        base: dict[str, Tensor] = self._state[1]["base"]
        return base

    def weights(self, module: nn.Module) -> dict[str, Callable[[], Mapping[str, Tensor]]]:
        """Return what computes the merged parameters of every model that is one set of weights, dense, by their names.

        Args:
            module: The classifier, with the weights that the run ended with.
        """
        if not self.base:
            return {}
        merge, base = self._merge, self.base
        merged = {
            name: partial(merge.merged_weights, name) for name, one in self._mergers.items() if not one.task_views
        }
        return {
            **merged,
            EXPERT: lambda: apply_task_vector(base, merge.task_vector(module)),
            ZERO_SHOT: lambda: base,
        }

    def enter(self, module: nn.Module) -> None:
        """Load the weights, running statistics and head that the run ended with into its classifier."""
        module.load_state_dict(self._state[0])

    def build_head(self, module: Classifier, prompts: Sequence[Sequence[str]]) -> None:
        """Make the text head of other classes, by the text tower before the first task, as the run's own was made.

        Args:
            module: The classifier, whose head is replaced.
            prompts: One list of prompts per class.
        """
        with swapped(module, state_of(module, self._state[1]["base"], {}, buffers=self._statistics)):
            module.head.build(module.backbone, len(prompts), prompts)

    def resolve(self, name: str) -> str:
        """Return the name of a model as the results have it; the name of a merger's class stands for it, too.

        Raises:
            ValueError: If the run has no such model.
        """
        found = by_class(name, self._mergers)
        if found not in self.names:
            raise ValueError(
                f"expected one of the models {', '.join(self.names)} of {self._folder.path}, got "
                f"{name!r}{did_you_mean(name, list(self.names))}"
            )
        return found

    def chooses(self, name: str) -> bool:
        """Return whether a model is made of what others are: a task's expert or view, chosen for every image."""
        label, _, kind = name.rpartition("+")
        routing = self._routings.get(kind)
        return routing is not None and (self._mergers[label].task_views or routing.predictor_class.needs_task)

    def predictor(self, name: str, module: Classifier) -> Predictor:
        """Return the predictor of a model; it has the weights that were evaluated after the last task.

        Args:
            name: A merger, ``MERGER+CALIBRATION``, ``MERGER+ROUTING``, ``expert`` or ``zero_shot``, or a merger by its
                class.
            module: The classifier; the weights and head that the run ended with are loaded into it.

        Raises:
            ValueError: If the run has no such model, or its file is missing.
        """
        name = self.resolve(name)
        self.enter(module)
        base = self._state[1]["base"]
        if not base:  # a frozen backbone: nothing was merged, and the head is the module's
            return Merged()
        if name == EXPERT:  # theta_0 + tau, as fit evaluates it
            return Merged(self._merge.weights_with(self._merge.task_vector(module), module))
        if name == ZERO_SHOT:
            return Merged(state_of(module, base, {}, buffers=self._statistics))
        if name in self._mergers:
            return self._merge.predictor(name, module)
        label, _, kind = name.rpartition("+")
        if kind in self._routings:
            return self._routed(label, self._routings[kind], module)
        state = self._calibrated(name, module)
        if not self._folder.model(f"{name}-{ADAPTERS}").is_file():
            return Merged(state)
        return Surgical(from_tensors(copy_with(module, state), self._read(f"{name}-{ADAPTERS}")), module.head)

    def _routed(self, label: str, routing: Routing, module: nn.Module) -> Predictor:
        """Return the predictor of a routed model from its file, or from the run's state if it chooses among views."""
        assert isinstance(module, Classifier)
        if self._mergers[label].task_views:
            routing.load_state_dict(self._state[1]["routing"][routing.name])
            return views_of(routing, self._merge, label, module)
        file = self._file(f"{label}+{routing.name}")
        return routing.predictor(load_routed(file, dense_copy(module.backbone)), module.head)

    def _calibrated(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        """Return the weights of a calibrated model from its files, by the classifier's own names."""
        dense = {f"{PREFIX}{key}": tensor for key, tensor in self._read(name).items()}
        if any(key.startswith("head.") for key in module.state_dict()) and (
            (file := f"{name}-{HEAD}") and self._folder.model(file).is_file()
        ):
            dense |= {f"head.{key}": tensor for key, tensor in self._read(file).items()}
        parts = {prefix + own for prefix, part in parametrized(module).items() for own in part.names()}
        base = {key: tensor for key, tensor in self._state[1]["base"].items() if key in parts}
        tau = {key: dense[key].to(tensor.dtype) - tensor for key, tensor in base.items()}
        own = own_names(module)
        plain = {own[key]: tensor for key, tensor in dense.items() if key in own and key not in parts}
        return {**plain, **state_of(module, base, tau)}

    def _read(self, name: str) -> dict[str, Tensor]:
        return load_tensors(self._file(name))

    def _file(self, name: str) -> Path:
        file = self._folder.model(name)
        if not file.is_file():
            raise ValueError(
                f"expected the model file {file}, got none: `clmerge fit --resume {self._folder.path}` makes it again"
            )
        return file
