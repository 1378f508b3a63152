"""Several merged models of one network after the tasks so far: theta_0, accumulators, running statistics."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from clmerge.deploy.learning import Losses, learning
from clmerge.deploy.naming import by_class, check_requirements, check_settings, name_mergers
from clmerge.deploy.predictors import Merged, PerTask, Predictor
from clmerge.distributed import of_rank_zero
from clmerge.merging import Gradients, Merger, Statistics, relocated
from clmerge.merging.checks import is_finite
from clmerge.results.results import EXPERT
from clmerge.weights import (
    BankVector,
    CheckedVector,
    State,
    TaskVectorBank,
    apply_task_vector,
    fingerprint,
    load_tensors,
)
from clmerge.weights.batch_norm import check_callable, estimated_statistics
from clmerge.weights.buffers import Buffers
from clmerge.weights.modes import eval_mode
from clmerge.weights.parametrization import (
    dense_weights,
    merged_parameters,
    read_task_vector,
    running_statistics,
    state_of,
    tied_names,
)
from clmerge.weights.swap import full_copy, swapped

_FIRST_FIT = "the weights at the start of the first fit"


class RunningMerge:
    """Fold task vectors into mergers, and return merged models for a network tuned in any mode; no Trainer needed.

    Args:
        mergers: One merger, a list of them, or a mapping from name to merger.
        deploy: Name of the merger that methods use by default, or ``"expert"`` for the un-merged model; default the
            first merger.
        base: theta_0: a safetensors file or a mapping from parameter name to tensor; default set by ``start``.
        buffers: Running statistics of the merged models: ``"latest"``, ``"base"``, ``"mean"`` over the tasks, or
            ``"re-estimated"`` for every merged model on ``images``, whenever a task has been merged.
        device: Device of base and accumulators: ``"cpu"`` or ``"model"`` for the parameters' device.
        score: Returns the held-out accuracy of the model, for mergers that require it.
        losses: Losses on adaptation images, for mergers that learn.
        statistics: Returns statistics of a task, for mergers that require them.
        images: Training images of the task in batches, for ``buffers="re-estimated"``.
        bank: Where every task vector will lie once it is folded in, under the index of its task. Mergers that need all
            of them read them there, one parameter at a time, instead of keeping copies.

    Attributes:
        mergers: The mergers by name.
        num_tasks: Number of tasks merged so far.
        update_seconds: Duration of the last update of every merger, by name.

    Raises:
        ValueError: For an unknown ``deploy`` or policy, mergers of equal names, or a merger whose requirement is
            missing.
    """

    def __init__(
        self,
        mergers: Merger | Sequence[Merger] | Mapping[str, Merger],
        *,
        deploy: str | None = None,
        base: str | Path | Mapping[str, Tensor] | None = None,
        buffers: Buffers = "latest",
        device: Literal["cpu", "model"] = "cpu",
        score: Callable[[LightningModule], float] | None = None,
        losses: Losses | None = None,
        statistics: Callable[[LightningModule], Statistics] | None = None,
        images: Callable[[LightningModule], Iterable[Tensor]] | None = None,
        bank: TaskVectorBank | None = None,
    ) -> None:
        self.mergers = name_mergers(mergers)
        check_choice("buffers", buffers, get_args(Buffers))
        check_choice("device", device, ("cpu", "model"))
        if EXPERT in self.mergers:
            raise ValueError(f"expected another name for a merger than {EXPERT!r}, which names the un-merged model")
        deploy = None if deploy is None else by_class(deploy, self.mergers)
        if deploy is not None and deploy not in [*self.mergers, EXPERT]:
            raise ValueError(f"expected deploy to be one of {[*self.mergers, EXPERT]}, got {deploy!r}")
        check_requirements(
            self.mergers, score=score is not None, losses=losses is not None, statistics=statistics is not None
        )
        self.deploy = deploy or next(iter(self.mergers))
        self.buffers = buffers
        self.device = device
        self.score = score
        self.losses = losses
        self.statistics = statistics
        self.images = images
        self.bank = bank
        self.num_tasks = 0
        self.update_seconds: dict[str, float] = {}
        self.base: dict[str, Tensor] = {}
        self.base_fingerprint: str | None = None
        self._base_origin = _FIRST_FIT
        self._buffers: dict[str, Tensor] = {}
        self._tied: dict[str, list[str]] = {}
        self._inside: str | None = None
        self._estimated: dict[str, dict[str, Tensor]] = {}
        if base is not None:
            if isinstance(base, (str, Path)):
                self._base_origin = f"base file {base}"
                base = load_tensors(base)
            else:
                self._base_origin = "base="
            self._set_base({name: full_copy(tensor) for name, tensor in base.items()})

    def start(
        self,
        model: nn.Module,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        *,
        frozen: bool = False,
    ) -> None:
        """Take theta_0 from a model, or check that the model fits the one there is.

        Args:
            model: The model before the first task, or before a later one.
            include: Glob patterns of the parameters to merge; default all trained ones.
            exclude: Glob patterns of parameters to leave out.
            frozen: Whether to include parameters that are frozen now because they will be trained later.

        Raises:
            RuntimeError: If the model has other parameters than theta_0.
            ValueError: If a merger's settings do not fit its parameters or the coming task.
        """
        selected = merged_parameters(model, include, exclude, frozen=frozen)
        self._tied = tied_names(model)
        if twice := [other for others in self._tied.values() for other in others if other in self.base]:
            self._set_base({name: tensor for name, tensor in self.base.items() if name not in twice})
        if not self.base:
            self._set_base({name: full_copy(tensor, self._device) for name, tensor in selected.items()})
        elif extra := [name for name in selected if name not in self.base]:
            raise RuntimeError(
                f"expected the parameters of {self._base_origin}, got {len(extra)} more in "
                f"{type(model).__name__}, the first {extra[0]!r}; leave them out with exclude=, or freeze them"
            )
        self._check_model(model)
        if self.buffers == "re-estimated":
            check_callable(model)
        check_settings(self.mergers, self.base, self.num_tasks + 1)
        if self.buffers == "base" and not self._buffers:
            self._buffers = running_statistics(model)

    def extend(self, parameters: Mapping[str, Tensor], *, moved: Sequence[str] = ()) -> None:
        """Add parameters to theta_0 that were frozen so far and are trained from now on.

        Args:
            parameters: The parameters by dense name.
            moved: Names of those that have already been changed.

        Raises:
            RuntimeError: If a task was merged without them, theta_0 was given without them, or they have already been
                changed.
        """
        reason = (
            f"not changed since the fit started, but {moved[0]!r} is"
            if moved
            else f"of the {self.num_tasks} tasks that were merged without them"
            if self.num_tasks
            else f"of {self._base_origin}, which lacks them"
            if self._base_origin != _FIRST_FIT
            else None
        )
        if reason is not None:
            raise RuntimeError(
                f"expected parameters {reason}, got {len(parameters)} that were unfrozen during the fit, the first "
                f"{next(iter(parameters))!r}: they would be trained and not merged; unfreeze them with a callback such "
                "as BackboneFinetuning in every fit, or make them trainable before the first, or name them in exclude="
            )
        self._set_base(self.base | {name: full_copy(tensor, self._device) for name, tensor in parameters.items()})

    @property
    def _device(self) -> torch.device | None:
        return None if self.device == "model" else torch.device("cpu")

    def merged_vector(self, name: str | None = None) -> dict[str, Tensor]:
        """Return the merged vector of a merger for the tasks so far.

        Args:
            name: Name of the merger; default the deployed one.

        Raises:
            RuntimeError: If no task has been merged.
            ValueError: For an unknown merger.
        """
        name = name or self.deploy
        if name not in self.mergers:
            raise ValueError(f"expected one of {list(self.mergers)}, got merger {name!r}")
        if not self.num_tasks:
            raise RuntimeError("expected at least one merged task, got none: fit first")
        return self.mergers[name].compute()

    def merged_weights(self, name: str | None = None) -> dict[str, Tensor]:
        """Return theta_0 plus the merged vector of the tasks so far, under the names of theta_0.

        Args:
            name: Name of the merger; default the deployed one.
        """
        return apply_task_vector(self.base, self.merged_vector(name))

    def weights_by_name(self, names: Iterable[str]) -> dict[str, Callable[[], dict[str, Tensor]]]:
        """Return what computes :meth:`merged_weights`, by name, of the mergers that are one set of weights.

        Args:
            names: Names of mergers.
        """
        return {name: partial(self.merged_weights, name) for name in names if not self.mergers[name].task_views}

    def merged_state(self, name: str | None = None) -> dict[str, Tensor]:
        """Return theta_0 plus the merged vector of the tasks so far: dense weights by dense names, to save.

        A model tuned with LoRA or in tangent space has other parameters: use ``state_with`` for these.

        Returns:
            Weights in the base's dtypes, and running statistics if ``buffers`` is not ``"latest"``. A parameter with
            several names (tied weights) is included under each of them.
        """
        merged = self.merged_weights(name)
        tied = {
            other: merged[first].clone() for first, others in self._tied.items() if first in merged for other in others
        }
        return {**merged, **tied, **self._running_statistics(name)}

    def _running_statistics(self, name: str | None) -> dict[str, Tensor]:
        return self._buffers if self.buffers != "re-estimated" else self._estimated.get(name or self.deploy, {})

    def state_with(
        self, vector: Mapping[str, Tensor], model: nn.Module, *, merger: str | None = None
    ) -> dict[str, Tensor]:
        """Return the tensors of a merged model by the module's names: theta_0 plus ``vector``, running statistics.

        Args:
            vector: The vector to add to theta_0; parameters that it lacks keep their base weights.
            model: The fitted LightningModule, which determines names and mode of tuning; it is not changed.
            merger: Merger of the vector, for re-estimated running statistics; default the deployed one.

        Raises:
            ValueError: If ``vector`` has a name or a shape that the base does not have.
        """
        return state_of(model, self.base, vector, buffers=self._running_statistics(merger), origin=self._base_origin)

    def predictor(self, name: str, model: nn.Module) -> Predictor:
        """Return the predictor of a merger: one merged model, or a view for every task merged so far.

        Args:
            name: Name of the merger.
            model: The fitted LightningModule.
        """
        merger = self.mergers[name]
        if not merger.task_views:
            return Merged(self.state_with(self.merged_vector(name), model, merger=name))
        return PerTask(lambda task: self.state_with(merger.task_view(task), model, merger=name), merger.tasks)

    def weights_with(self, vector: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Return theta_0 plus ``vector`` as the module's parameters, without running statistics.

        For a task's own vector this is its expert, which uses the module's own running statistics.

        Args:
            vector: The vector to add to theta_0; parameters that it lacks keep their base weights.
            model: The fitted LightningModule.
        """
        return state_of(model, self.base, vector, origin=self._base_origin)

    @contextmanager
    def merged(self, model: nn.Module, name: str | None = None) -> Iterator[None]:
        """Run a block with the merged weights in ``model``; the training weights are always restored.

        Args:
            model: The fitted LightningModule.
            name: Name of the merger; default the deployed one.
        """
        with swapped(model, self.state_with(self.merged_vector(name), model, merger=name)):
            around, self._inside = self._inside, name or self.deploy
            try:
                yield
            finally:
                self._inside = around

    def task_vector(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the task vector of a model that holds its training weights."""
        return read_task_vector(model, self.base, device=self._device, origin=self._base_origin)

    @property
    def required_statistics(self) -> frozenset[str]:
        """Names of the statistics that the mergers require."""
        return frozenset[str]().union(*(merger.requires for merger in self.mergers.values()))

    def fold(
        self,
        tau: Mapping[str, Tensor],
        model: LightningModule,
        *,
        task: int | None = None,
        given: Statistics | None = None,
        store: Callable[[State], None] | None = None,
    ) -> None:
        """Fold one task vector into every merger, with the statistics they require; every ``fit`` calls this itself.

        Statistics are measured on theta_0 + tau, so that they can be measured again from a stored task vector.

        Args:
            tau: The task vector; if it cannot be merged, no merger is changed.
            model: The model with the task's running statistics and head, if any.
            task: Index of the task, which seeds random rules; default the number of tasks merged so far.
            given: Known statistics; ``statistics=`` measures the others.
            store: Puts the vector into the bank, once every merger has folded it in.

        Raises:
            RuntimeError: If the vector holds NaN or Inf.
        """
        task = self.num_tasks if task is None else task
        for name, tensor in tau.items():
            if not is_finite(tensor):
                raise RuntimeError(
                    f"expected finite weights to merge, got NaN or Inf in {name!r} of the weights of task {task}; "
                    "the merged models are unchanged: lower the learning rate, or clip gradients"
                )
        tau = tau if isinstance(tau, CheckedVector) else CheckedVector(tau)
        if self.bank is not None and tau.stored is None:
            tau.stored = BankVector(self.bank, task, tau.sha256)
        measured = self.measured(tau, model, given)
        self._merge_buffers(model)
        for name, merger in self.mergers.items():
            started = time.perf_counter()
            score = self.scorer(model) if merger.requires_score else None
            with ExitStack() as stack:
                gradients = stack.enter_context(self._gradients(model, name)) if merger.requires_gradient else None
                merger.update(
                    tau,
                    task=task,
                    base=self.base_fingerprint,
                    score=score,
                    gradients=gradients,
                    statistics=measured,
                )
            if merger.requires_gradient:  # what processes have learned differs in the last bits
                merger.load_state_dict(of_rank_zero(merger.state_dict()))
            self.update_seconds[name] = time.perf_counter() - started
        self.num_tasks += 1
        self._folded(tau)
        if store is not None:
            store(tau)
        self._estimate_all(model)

    def measured(
        self, tau: Mapping[str, Tensor], model: LightningModule, given: Statistics | None = None
    ) -> dict[str, Any]:
        """Return the statistics of a task that the mergers require; ``statistics=`` measures those that are not given.

        Args:
            tau: The task vector.
            model: The model with the task's running statistics and head, if any.
            given: Known statistics.
        """
        known = dict(given or {})
        if self.statistics is not None and self.required_statistics - known.keys():
            with swapped(model, self.weights_with(tau, model)):
                known |= self.statistics(model)
        return known

    def _folded(self, tau: CheckedVector) -> None:
        """Record a vector that every merger has folded in."""

    def _estimate_all(self, model: LightningModule) -> None:
        """Estimate the running statistics of every merged model, if ``buffers`` says so."""
        if self.buffers == "re-estimated":
            for name in [name for name, merger in self.mergers.items() if merger.num_tasks]:
                with swapped(model, self.weights_with(self.merged_vector(name), model)):
                    self._estimated[name] = self._estimate(model)

    def _estimate(self, model: LightningModule) -> dict[str, Tensor]:
        """Return the running statistics of the model's current weights on the task's images."""
        if self.images is None:
            raise RuntimeError("expected images= for buffers='re-estimated', got none; pass the task's training images")
        return estimated_statistics(model, self.images(model))

    def scorer(self, pl_module: LightningModule) -> Callable[[Mapping[str, Tensor]], float]:
        """Return a function that gives the held-out accuracy of theta_0 plus a vector.

        Args:
            pl_module: The module, into which the weights are swapped.
        """
        function = self.score
        assert function is not None

        def score(vector: Mapping[str, Tensor]) -> float:
            candidate = self.state_with(vector, pl_module)
            if self.buffers == "re-estimated":
                with swapped(pl_module, self.weights_with(vector, pl_module)):
                    buffers = self._estimate(pl_module)
                candidate = state_of(pl_module, self.base, vector, buffers=buffers, origin=self._base_origin)
            with swapped(pl_module, candidate), eval_mode(pl_module), torch.no_grad():
                return float(function(pl_module))

        return score

    def _gradients(self, model: nn.Module, merger: str) -> AbstractContextManager[Gradients]:
        """Open the model for a merger that learns."""
        losses = self.losses
        assert losses is not None
        # Statistics that are estimated for every merged model do not exist yet: the task's own are the nearest.
        buffers = {} if self.buffers == "re-estimated" else self._running_statistics(merger)
        return learning(model, self.base, losses, buffers=buffers, origin=self._base_origin)

    def accumulators(self) -> dict[str, Any]:
        """Return base, accumulators and counters: plain tensors and primitives, safe for ``weights_only`` loading."""
        return {
            "num_tasks": self.num_tasks,
            "base": dict(self.base),
            "base_fingerprint": self.base_fingerprint,
            "buffers": dict(self._buffers),
            "tied": {name: list(others) for name, others in self._tied.items()},
            "estimated": {name: dict(tensors) for name, tensors in self._estimated.items()},
            # The bank beside which a state is saved is not named, so that a run folder can be moved.
            "mergers": {
                name: relocated(merger.state_dict(), self._folder, "") for name, merger in self.mergers.items()
            },
        }

    def load_accumulators(self, state: Mapping[str, Any]) -> None:
        """Load a state returned by ``accumulators``.

        Raises:
            RuntimeError: If the state holds other mergers, or another base than the one given to the constructor;
                nothing is changed then.
        """
        if set(state["mergers"]) != set(self.mergers):
            raise RuntimeError(
                f"expected the state of mergers {sorted(self.mergers)}, got {sorted(state['mergers'])}; "
                "resume with the mergers of the interrupted run"
            )
        found = state["base_fingerprint"]
        if self.base_fingerprint is not None and found is not None and found != self.base_fingerprint:
            raise RuntimeError(
                f"expected the base {self.base_fingerprint[:12]} of {self._base_origin}, got a state that was "
                f"accumulated against {found[:12]}: task vectors of different bases cannot be merged"
            )
        for name, merger in self.mergers.items():
            merger.load_state_dict(relocated(state["mergers"][name], "", self._folder))
        self.num_tasks = int(state["num_tasks"])
        if state["base"]:
            self.base = dict(state["base"])
            self.base_fingerprint = found
        self._buffers = dict(state["buffers"])
        self._tied = dict(state.get("tied", {}))  # missing in states of older versions of clmerge
        self._estimated = {name: dict(tensors) for name, tensors in state.get("estimated", {}).items()}

    @property
    def _folder(self) -> str:
        return "" if self.bank is None else str(self.bank.folder.resolve())

    def _set_base(self, base: dict[str, Tensor]) -> None:
        self.base = base
        self.base_fingerprint = fingerprint(base)

    def _check_model(self, model: nn.Module) -> None:
        for name, tensor in dense_weights(model, self.base, origin=self._base_origin).items():
            if tensor.shape != self.base[name].shape:
                raise RuntimeError(
                    f"expected {name!r} of shape {tuple(self.base[name].shape)} as in {self._base_origin}, got "
                    f"{tuple(tensor.shape)}; a parameter that grows (a head) must be left out with exclude="
                )

    def _merge_buffers(self, pl_module: LightningModule) -> None:
        if self.buffers == "mean":
            for name, value in running_statistics(pl_module).items():
                mean = self._buffers.get(name, torch.zeros_like(value))
                self._buffers[name] = mean + (value - mean) / (self.num_tasks + 1)


def check_choice(parameter: str, value: str, allowed: Sequence[str]) -> None:
    """Raise a ValueError if a parameter does not have an allowed value."""
    if value not in allowed:
        raise ValueError(f"expected {parameter} to be one of {allowed}, got {value!r}")
