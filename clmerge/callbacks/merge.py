"""Fold every task's fine-tuned weights into running merged models, inside any Lightning project."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from clmerge.callbacks.evaluation_swap import EvaluationSwap
from clmerge.callbacks.naming import check_requirements, name_mergers
from clmerge.callbacks.provided import provided
from clmerge.callbacks.ranks import check_same_on_all_ranks
from clmerge.lightning_compat import refuse_unsupported_strategy
from clmerge.merging import Merger, Statistics
from clmerge.merging.checks import is_finite
from clmerge.weights import CheckedVector, TaskVectorBank, apply_task_vector, fingerprint, load_tensors
from clmerge.weights.modes import eval_mode
from clmerge.weights.parametrization import (
    dense_weights,
    merged_parameters,
    read_task_vector,
    renew,
    running_statistics,
    state_of,
)
from clmerge.weights.swap import assign, full_copy, named_tensors, swapped

StartPolicy = Literal["base", "previous", "merged"]
Buffers = Literal["latest", "base", "mean"]


class MergeCallback(EvaluationSwap):
    """Merge after every ``fit``: one task vector per fit, any LightningModule, any number of Trainers.

    Every finished ``fit`` is a task. Its task vector ``theta_t - theta_0`` goes to every merger; the model itself keeps
    the trained weights, and the merged weights are swapped in for ``trainer.test``, ``trainer.predict`` and a
    standalone ``trainer.validate``, and out again afterwards, also after an exception. Validation inside ``fit`` stays
    on the training weights, which early stopping needs. Keep one instance for the whole stream and hand it to every
    Trainer.

    Accumulators are saved in Lightning's checkpoints under this callback's state; the checkpoint's ``state_dict`` stays
    the training weights. A fit that resumes after its last epoch merges then; a fit that trained nothing warns and
    merges nothing.

    Args:
        mergers: One merger, a list of them, or a mapping from name to merger. In a list, mergers go by their names
            (``"magmax"``), or by name and settings where two are of the same class.
        start_policy: Where the next task starts: ``"base"`` (theta_0), ``"previous"`` (the un-merged weights of the
            task before) or ``"merged"`` (theta_0 plus the deployed merged vector).
        deploy: Name of the merger whose weights are swapped in; default the first.
        include: Glob patterns of the parameters to merge; default every trainable floating parameter.
        exclude: Glob patterns of parameters to leave out, heads for instance. They keep their trained values.
        base: theta_0: a safetensors file or a mapping from parameter name to tensor. By default the weights at the
            start of the first fit, after a checkpoint has been restored.
        buffers: Running statistics of the merged model: ``"latest"`` (of the last task, the default), ``"base"`` or
            ``"mean"`` over the tasks. Integer buffers are never merged.
        device: Where base and accumulators live: ``"cpu"`` (default), or ``"model"`` for the parameters' device.
        bank: Folder that keeps every task vector, for mergers that need them all and for merging again later.
        score: Held-out accuracy of the model as it stands, higher is better; called with merged candidates swapped in.
            Only mergers that require ``"score"`` (GreedySoup, PAINT) need it.
        statistics: What was measured on the task, called with the trained model while the task's data is still there;
            for mergers that require it (Fisher: ``"fisher"``, RegMean: ``"gram"``). Returns name -> number, or name ->
            tensors by parameter name. What needs no data is there without: ``"adam"`` and ``"weights"`` (theta_0).
        seed: Seed of the factors that low-rank modes of tuning start every task with.
        save_state: Whether accumulators travel in Lightning's checkpoints (default).

    Attributes:
        mergers: The mergers by name.
        num_tasks: Tasks merged so far.
        seconds: Time that the last merge took.
        update_seconds: Time that the last update of every merger took, by name.

    Raises:
        ValueError: For an unknown ``deploy`` or policy, mergers of equal names, or a merger that needs a missing
            ``score``.
        RuntimeError: During a run, for a changed model, a changed base, NaN in the weights, or a strategy that hides
            the trained weights from this process.

    Example:
        >>> from clmerge.merging import MagMax
        >>> merge = MergeCallback(MagMax(scale=0.5), start_policy="previous")
        >>> list(merge.mergers), merge.num_tasks
        (['magmax'], 0)
    """

    def __init__(
        self,
        mergers: Merger | Sequence[Merger] | Mapping[str, Merger],
        *,
        start_policy: StartPolicy = "previous",
        deploy: str | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        base: str | Path | Mapping[str, Tensor] | None = None,
        buffers: Buffers = "latest",
        device: Literal["cpu", "model"] = "cpu",
        bank: str | Path | None = None,
        score: Callable[[LightningModule], float] | None = None,
        statistics: Callable[[LightningModule], Statistics] | None = None,
        seed: int = 0,
        save_state: bool = True,
    ) -> None:
        self.mergers = name_mergers(mergers)
        for value, allowed, parameter in (
            (start_policy, ("base", "previous", "merged"), "start_policy"),
            (buffers, ("latest", "base", "mean"), "buffers"),
            (device, ("cpu", "model"), "device"),
        ):
            if value not in allowed:
                raise ValueError(f"expected {parameter} to be one of {allowed}, got {value!r}")
        if deploy is not None and deploy not in self.mergers:
            raise ValueError(f"expected deploy to be one of {list(self.mergers)}, got {deploy!r}")
        check_requirements(self.mergers, score=score is not None, statistics=statistics is not None)
        self.start_policy = start_policy
        self.deploy = deploy or next(iter(self.mergers))
        self.include = None if include is None else list(include)
        self.exclude = list(exclude)
        self.buffers = buffers
        self.device = device
        self.bank: TaskVectorBank | None = None
        if bank is not None:
            self.use_bank(bank)
        self.score = score
        self.statistics = statistics
        self.seed = seed
        self.save_state = save_state
        self.num_tasks = 0
        self.seconds = 0.0
        self.update_seconds: dict[str, float] = {}
        self.base: dict[str, Tensor] = {}
        self.base_fingerprint: str | None = None
        self._base_origin = "the weights at the start of the first fit"
        self._buffers: dict[str, Tensor] = {}
        self._task_name: str | None = None
        self._task_samples: int | None = None
        self._merged_this_fit = False
        if base is not None:
            if isinstance(base, (str, Path)):
                self._base_origin = f"base file {base}"
                base = load_tensors(base)
            else:
                self._base_origin = "base="
            self._set_base({name: full_copy(tensor) for name, tensor in base.items()})

    @property
    def state_key(self) -> str:
        """The key of this callback's state in Lightning's checkpoints: several merge callbacks can coexist."""
        return self._generate_state_key(mergers=",".join(self.mergers), start_policy=self.start_policy)

    def next_task(self, name: str, *, samples: int | None = None) -> None:
        """Say what the next ``fit`` trains; it is stored beside the vector in the bank.

        Args:
            name: What the task is called.
            samples: How many training images it has.
        """
        self._task_name = name
        self._task_samples = samples

    def use_bank(self, folder: str | Path) -> None:
        """Keep every task vector from now on in ``folder``."""
        self.bank = TaskVectorBank(folder)

    # Reading the merged models -----------------------------------------------------------------------------------

    def merged_vector(self, name: str | None = None) -> dict[str, Tensor]:
        """Return what a merger adds to theta_0 for the tasks so far.

        Args:
            name: Which merger; default the deployed one.

        Raises:
            RuntimeError: Before the first task was merged.
            ValueError: For a merger that is not there.
        """
        name = name or self.deploy
        if name not in self.mergers:
            raise ValueError(f"expected one of {list(self.mergers)}, got merger {name!r}")
        if not self.num_tasks:
            raise RuntimeError("expected at least one merged task, got none: fit first")
        return self.mergers[name].compute()

    def merged_state(self, name: str | None = None) -> dict[str, Tensor]:
        """Return theta_0 plus the merged vector of the tasks so far: dense weights by dense names, to save.

        A model that is tuned with LoRA or in tangent space has other parameters: ``state_with`` is for those.

        Returns:
            Weights in the base's dtypes, and running statistics if ``buffers`` is not ``"latest"``.
        """
        return {**apply_task_vector(self.base, self.merged_vector(name)), **self._buffers}

    def state_with(self, vector: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Return what a merged model has in place of the module's tensors: theta_0 plus ``vector``, running statistics.

        Args:
            vector: What is added to theta_0; parameters that it leaves out keep their base weights.
            model: The LightningModule that was fitted, whose own names and mode of tuning count; it is not changed.

        Raises:
            ValueError: If ``vector`` has a name or a shape that the base does not have.
        """
        return state_of(model, self.base, vector, buffers=self._buffers, origin=self._base_origin)

    def weights_with(self, vector: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Return theta_0 plus ``vector`` as the module's parameters, without running statistics.

        For a task's own vector that is its expert, whose running statistics are the module's own.

        Args:
            vector: What is added to theta_0; parameters that it leaves out keep their base weights.
            model: The LightningModule that was fitted.
        """
        return state_of(model, self.base, vector, origin=self._base_origin)

    @contextmanager
    def merged(self, model: nn.Module, name: str | None = None) -> Iterator[None]:
        """Run a block with the merged weights in ``model``; the training weights come back in any case.

        Args:
            model: The LightningModule that was fitted.
            name: Which merger; default the deployed one.
        """
        with swapped(model, self.state_with(self.merged_vector(name), model)):
            yield

    def apply_start_policy(self, model: nn.Module) -> None:
        """Give ``model`` the weights that the next task starts from; every ``fit`` does this by itself."""
        if self.num_tasks and self.start_policy != "previous":
            from_base = self.start_policy == "base"
            start = self.weights_with({}, model) if from_base else self.state_with(self.merged_vector(), model)
            assign(named_tensors(model, start, origin=self._base_origin), start)
        renew(model, seed=self.seed, task=self.num_tasks)

    @override
    def _evaluation_state(self, pl_module: LightningModule) -> dict[str, Tensor] | None:
        return self.state_with(self.merged_vector(), pl_module) if self.num_tasks else None

    # Training ----------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_unsupported_strategy(trainer)
        if stage == "fit":  # before Lightning restores a checkpoint: what a checkpoint holds wins over the start policy
            self.apply_start_policy(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._merged_this_fit = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        selected = merged_parameters(pl_module, self.include, self.exclude)
        device = None if self.device == "model" else torch.device("cpu")
        if not self.base:
            self._set_base({name: full_copy(tensor, device) for name, tensor in selected.items()})
        elif extra := [name for name in selected if name not in self.base]:
            raise RuntimeError(
                f"expected the parameters of {self._base_origin}, got {len(extra)} more in "
                f"{type(pl_module).__name__}, the first {extra[0]!r}; leave them out with exclude=, or freeze them"
            )
        self._check_model(pl_module)
        if self.buffers == "base" and not self._buffers:
            self._buffers = running_statistics(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._merge(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._merged_this_fit:
            return
        # A run killed between its last checkpoint and its merge has nothing left to train when it resumes, and
        # Lightning then calls no on_train_end: without this the task would be lost without a word.
        if trainer.ckpt_path is not None and trainer.global_step > 0 and trainer.fit_loop.done and self.base:
            self._merge(trainer, pl_module)
        else:
            warnings.warn(
                "this fit trained nothing, so nothing was merged: use a new Trainer for every task "
                "(a Trainer that has reached max_epochs returns at once)",
                RuntimeWarning,
                stacklevel=2,
            )

    def _merge(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fold the trained weights into every merger; weights that cannot be merged reach none of them."""
        started = time.perf_counter()
        tau = self.task_vector(pl_module)
        self.fold(tau, pl_module, given=provided(self.required_statistics, trainer, pl_module, self.base))
        if self.bank is not None and trainer.is_global_zero:
            task = self.num_tasks - 1
            counts = {"steps": trainer.global_step, "samples": self._task_samples}
            # A run killed after its merge has written this vector already.
            again = trainer.ckpt_path is not None
            name = self._task_name or f"task_{task:03d}"
            self.bank.append(task, tau, name=name, base=self.base_fingerprint, counts=counts, overwrite=again)
        self._task_name = self._task_samples = None
        self._merged_this_fit = True
        if trainer.world_size > 1:
            check_same_on_all_ranks(trainer, [merger.compute() for merger in self.mergers.values()])
        self.seconds = time.perf_counter() - started

    def task_vector(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what training has added to theta_0 in a model that holds its training weights."""
        device = None if self.device == "model" else torch.device("cpu")
        return read_task_vector(model, self.base, device=device, origin=self._base_origin)

    @property
    def required_statistics(self) -> frozenset[str]:
        """What the mergers require of every task beside its vector and a score."""
        return frozenset[str]().union(*(merger.requires for merger in self.mergers.values())) - {"score"}

    def fold(
        self,
        tau: Mapping[str, Tensor],
        model: LightningModule,
        *,
        task: int | None = None,
        given: Statistics | None = None,
    ) -> None:
        """Fold one task vector into every merger, with what they require; every ``fit`` does this by itself.

        Statistics are measured on theta_0 + tau, so that they can be measured again from a kept task vector.

        Args:
            tau: The task vector; one that cannot be merged reaches no merger.
            model: The model with the running statistics, and a head if it has one, that belong to the task.
            task: Index of the task, which seeds random rules; default the number of tasks merged so far.
            given: Statistics that are known already; ``statistics=`` measures what is missing.

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
        tau = CheckedVector(tau)
        measured = dict(given or {})
        if self.statistics is not None and self.required_statistics - measured.keys():
            with swapped(model, self.weights_with(tau, model)):
                measured |= self.statistics(model)
        self._merge_buffers(model)
        for name, merger in self.mergers.items():
            started = time.perf_counter()
            score = self._scorer(model) if "score" in merger.requires else None
            merger.update(tau, task=task, base=self.base_fingerprint, score=score, statistics=measured)
            self.update_seconds[name] = time.perf_counter() - started
        self.num_tasks += 1

    def _scorer(self, pl_module: LightningModule) -> Callable[[Mapping[str, Tensor]], float]:
        function = self.score
        assert function is not None

        def score(vector: Mapping[str, Tensor]) -> float:
            candidate = self.state_with(vector, pl_module)
            with swapped(pl_module, candidate), eval_mode(pl_module), torch.no_grad():
                return float(function(pl_module))

        return score

    # State -------------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.accumulators() if self.save_state else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self.load_accumulators(state_dict)

    def accumulators(self) -> dict[str, Any]:
        """Return base, accumulators and counters: plain tensors and primitives, safe for ``weights_only`` loading."""
        return {
            "num_tasks": self.num_tasks,
            "base": dict(self.base),
            "base_fingerprint": self.base_fingerprint,
            "buffers": dict(self._buffers),
            "mergers": {name: merger.state_dict() for name, merger in self.mergers.items()},
        }

    def load_accumulators(self, state: Mapping[str, Any]) -> None:
        """Take over what ``accumulators`` returned.

        Raises:
            RuntimeError: If the state holds other mergers, or another base than the one given to the constructor;
                this callback is unchanged then.
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
            merger.load_state_dict(state["mergers"][name])
        self.num_tasks = int(state["num_tasks"])
        if state["base"]:
            self.base = dict(state["base"])
            self.base_fingerprint = found
        self._buffers = dict(state["buffers"])

    def _set_base(self, base: dict[str, Tensor]) -> None:
        self.base = base
        self.base_fingerprint = fingerprint(base)

    def _check_model(self, pl_module: LightningModule) -> None:
        for name, tensor in dense_weights(pl_module, self.base, origin=self._base_origin).items():
            if tensor.shape != self.base[name].shape:
                raise RuntimeError(
                    f"expected {name!r} of shape {tuple(self.base[name].shape)} as in {self._base_origin}, got "
                    f"{tuple(tensor.shape)}; a parameter that grows (a head) must be left out with exclude="
                )

    # Buffers -------------------------------------------------------------------------------------------

    def _merge_buffers(self, pl_module: LightningModule) -> None:
        if self.buffers == "mean":
            for name, value in running_statistics(pl_module).items():
                mean = self._buffers.get(name, torch.zeros_like(value))
                self._buffers[name] = mean + (value - mean) / (self.num_tasks + 1)
