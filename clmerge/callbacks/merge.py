"""Fold every task's fine-tuned weights into running merged models, inside any Lightning project."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from clmerge.callbacks.frozen import FrozenParameters, announces_unfreezing
from clmerge.callbacks.merged_evaluation import MergedEvaluation
from clmerge.callbacks.ranks import check_same_on_all_ranks, refuse_sharding
from clmerge.callbacks.saved_checkpoints import keep_merge, read_state
from clmerge.deploy.learning import Losses
from clmerge.deploy.naming import by_class
from clmerge.deploy.running_merge import check_choice
from clmerge.lightning_compat import refuse_empty_average, refuse_unsupported_strategy, refuse_used_average
from clmerge.merging import Merger, Statistics
from clmerge.results.results import EXPERT
from clmerge.statistics.provided import check_provided, provided, training_images
from clmerge.weights import CheckedVector, State, TaskVectorBank
from clmerge.weights.buffers import Buffers
from clmerge.weights.modes import on_device
from clmerge.weights.parametrization import read_factors, renew, unmerged_parameters
from clmerge.weights.swap import assign, is_swapped, named_tensors

StartPolicy = Literal["base", "previous", "merged"]
HandOver = Callable[[Statistics, int], None]


class MergeCallback(MergedEvaluation):
    """Merge after every ``fit``: one task vector per fit, any LightningModule, any number of Trainers.

    Every finished ``fit`` is a task. Its final weights are merged after the last hook of every other callback (weight
    averaging included): the task vector ``theta_t - theta_0`` is folded into every merger. The model itself keeps
    the trained weights. The merged weights are swapped in for ``trainer.test``, ``trainer.predict`` and a
    standalone ``trainer.validate``, and swapped out afterwards, also after an exception. Validation inside ``fit`` uses
    the training weights, which early stopping needs. Keep one instance for the whole stream and pass it to every
    Trainer.

    Accumulators are saved in Lightning's checkpoints under this callback's state; the checkpoint's ``state_dict`` holds
    the training weights. When a task is merged, the merge is added to the checkpoints that its fit wrote. Evaluation
    with a ``ckpt_path`` never changes the accumulators; a ``fit`` with one never loses a merged task. A fit that
    resumes after its last epoch merges its task; a fit that trained nothing warns and merges nothing.
    docs/lifecycle.md describes every hook.

    Args:
        mergers: One merger, a list of them, or a mapping from name to merger. In a list, a merger is named by its
            ``name`` (``"magmax"``), or by name and settings if two have the same class.
        start_policy: Weights at the start of the next task: ``"base"`` (theta_0), ``"previous"`` (the un-merged weights
            of the previous task) or ``"merged"`` (theta_0 plus a merged vector, see ``start_from``).
        deploy: Name of the merger whose weights are swapped in; default the first. With ``"expert"`` nothing is swapped
            in and the un-merged model is tested.
        start_from: Name of the merger whose weights are the start under ``"merged"``, for example a moving average
            (``"wise_ft"``); default the deployed one.
        include: Glob patterns of the parameters to merge; default every trainable floating parameter.
        exclude: Glob patterns of parameters to leave out, for example heads. They keep their trained values.
        base: theta_0: a safetensors file or a mapping from parameter name to tensor. By default the weights at the
            start of the first fit, after a checkpoint has been restored.
        buffers: Running statistics of the merged model: ``"latest"`` (of the last task, the default), ``"base"``,
            ``"mean"`` over the tasks, or ``"re-estimated"``: after every task each merged model is run on the task's
            training images (``images``), and its statistics are averaged over the batches, as in ``update_bn`` of
            stochastic weight averaging. Integer buffers are never merged.
        device: Device of base and accumulators: ``"cpu"`` (default), or ``"model"`` for the parameters' device.
        bank: Folder that stores every task vector, for merging again later. Mergers that need all of them read them
            there, one parameter at a time, instead of keeping copies in memory and in checkpoints.
        score: Returns the held-out accuracy of the model, higher is better; called with merged candidates swapped in.
            Only mergers that require a score (GreedySoup, PAINT) need it.
        losses: Yields losses on adaptation images, for mergers that learn (AdaMerging); ``clmerge.deploy.learning``
            says how they are called.
        statistics: Returns statistics of the task; called with the trained model while the task's data is available,
            for mergers that require it (Fisher: ``"fisher"``, RegMean: ``"gram"``). Returns name -> number, or name ->
            tensors by parameter name. ``"adam"`` and ``"weights"`` (theta_0) need no data and are always available.
        images: Training images of the task in batches, for ``buffers="re-estimated"``; passed to ``forward``. Default
            the batches of the Trainer's training dataloader (the first item of a batch that is a tuple).
        seed: Seed of the factors that low-rank modes of tuning draw at the start of every task.
        save_state: Whether accumulators are saved in Lightning's checkpoints (default).

    Attributes:
        mergers: The mergers by name.
        bank: The bank of the task vectors, if there is one; another may be set before the first task.
        num_tasks: Number of tasks merged so far.
        vectors: Fingerprints of the merged task vectors, in order.
        hand_over: Called with the statistics and optimizer steps of a finished task, in place of merging it; for a
            process that trains a task which another one merges.
        seconds: Duration of the last merge.
        update_seconds: Duration of the last update of every merger, by name.

    Raises:
        ValueError: For an unknown ``deploy`` or policy, mergers of equal names, or a merger that needs a missing
            ``score``.
        RuntimeError: During a run, for a changed model, a changed base, NaN in the weights, a fit within ``merged``, or
            a strategy under which this process cannot read the trained weights.

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
        start_from: str | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        base: str | Path | Mapping[str, Tensor] | None = None,
        buffers: Buffers = "latest",
        device: Literal["cpu", "model"] = "cpu",
        bank: str | Path | None = None,
        score: Callable[[LightningModule], float] | None = None,
        losses: Losses | None = None,
        statistics: Callable[[LightningModule], Statistics] | None = None,
        images: Callable[[LightningModule], Iterable[Tensor]] | None = None,
        seed: int = 0,
        save_state: bool = True,
    ) -> None:
        super().__init__(
            mergers,
            deploy=deploy,
            base=base,
            buffers=buffers,
            device=device,
            score=score,
            losses=losses,
            statistics=statistics,
            images=images or training_images,
            bank=None if bank is None else TaskVectorBank(bank),
        )
        check_choice("start_policy", start_policy, ("base", "previous", "merged"))
        names = list(self.mergers)
        start_from = None if start_from is None else by_class(start_from, self.mergers)
        if start_from is not None and (start_policy != "merged" or start_from not in names):
            raise ValueError(
                f"expected start_from to be one of {names} under start_policy='merged', got {start_from!r} under "
                f"{start_policy!r}"
            )
        self.start_policy = start_policy
        self.start_from = start_from or (names[0] if self.deploy == EXPERT else self.deploy)
        self.include = None if include is None else list(include)
        self.exclude = list(exclude)
        self.seed = seed
        self.save_state = save_state
        self.hand_over: HandOver | None = None
        self.seconds = 0.0
        self._task_name: str | None = None
        self._task_samples: int | None = None
        self._task_index: int | None = None
        self._stage: str | None = None
        self._given: Statistics | None = None
        self._trained = False
        self._pending = False
        self._goes_on: bool | None = None
        self._frozen = FrozenParameters({})

    @property
    def state_key(self) -> str:
        """The key of this callback's state in Lightning's checkpoints; it differs between merge callbacks."""
        return self._generate_state_key(mergers=",".join(self.mergers), start_policy=self.start_policy)

    def next_task(self, name: str, *, samples: int | None = None, index: int | None = None) -> None:
        """Set name and size of the next task, which are stored with its vector in the bank.

        Args:
            name: Name of the task.
            samples: Number of its training images.
            index: Its index in the stream, which seeds random rules and initial factors. Default: the number of tasks
                merged so far; a process that trains one of many tasks must name it, or all processes would draw alike.
        """
        self._task_name = name
        self._task_samples = samples
        self._task_index = index

    @property
    def task(self) -> int:
        """Index of the next task in the stream."""
        return self.num_tasks if self._task_index is None else self._task_index

    def load_checkpoint(self, path: str | Path) -> None:
        """Load the merges in a Lightning checkpoint, to continue with the next task in another process.

        Args:
            path: Checkpoint by ``ModelCheckpoint`` or ``trainer.save_checkpoint`` after the last task.

        Raises:
            ValueError: If it has no state of this callback, or was written before its task was merged.
        """
        state = read_state(path, self.state_key)
        if state["pending"]:
            raise ValueError(
                f"expected a checkpoint of a fit that has ended, got {path}, which was written during task "
                f"{state['num_tasks']} of a fit that did not end; resume it with fit(ckpt_path=...)"
            )
        self.load_accumulators(state)

    def apply_start_policy(self, model: nn.Module) -> None:
        """Set the weights of ``model`` to the start of the next task; every ``fit`` calls this itself."""
        if self.num_tasks and self.start_policy != "previous":
            from_base = self.start_policy == "base"
            start = (
                self.weights_with({}, model)
                if from_base
                else self.state_with(self.merged_vector(self.start_from), model, merger=self.start_from)
            )
            assign(named_tensors(model, start, origin=self._base_origin), start)
        renew(model, seed=self.seed, task=self.task)

    # Training ----------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_unsupported_strategy(trainer)
        refuse_sharding(trainer, pl_module)
        if stage == "fit" and is_swapped(pl_module):
            raise RuntimeError(
                f"expected a fit from the training weights, got {type(pl_module).__name__} with merged weights in it: "
                "what it trains would be lost at the end of merge.merged(model); leave the block first"
            )
        self._stage = stage
        self._restored = {}
        if stage == "fit":  # before Lightning restores a checkpoint: what a checkpoint holds wins over the start policy
            self._trained, self._pending, self._goes_on, self._given = False, True, None, None
            self._frozen = FrozenParameters({})
            self.apply_start_policy(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_used_average(trainer)
        if self._goes_on is False:  # the checkpoint is of an earlier task: this one starts here
            self.apply_start_policy(pl_module)
        self.start(pl_module, self.include, self.exclude, frozen=announces_unfreezing(trainer))
        check_provided(self.required_statistics, trainer, pl_module, self.base)
        self._frozen = FrozenParameters(unmerged_parameters(pl_module, self.base, self.include, self.exclude))
        if self.bank is not None and trainer.is_global_zero:
            again = trainer.ckpt_path is not None and self._goes_on is not False
            self.bank.check_next(self.vectors, base=self.base_fingerprint, again=again)

    def take_base(self, model: nn.Module) -> None:
        """Take theta_0 from ``model`` if it is not set, else check that the model fits it; every ``fit`` calls this.

        Args:
            model: The model before the first task, or before a later one.

        Raises:
            RuntimeError: If the model has other parameters than theta_0.
        """
        self.start(model, self.include, self.exclude)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if thawed := self._frozen.thawed():
            self.extend(thawed, moved=self._frozen.changed(thawed))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = True
        # The optimizers still exist here; the weights are read later, after the hooks of every other callback.
        self._given = provided(self.required_statistics, trainer, pl_module, self.base)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run killed between its last checkpoint and its merge has nothing left to train when it resumes, and
        # Lightning does not call on_train_end then: without this the task would be lost silently.
        goes_on = not self.save_state if self._goes_on is None else self._goes_on
        resumed = trainer.ckpt_path is not None and trainer.global_step > 0 and trainer.fit_loop.done
        if self._trained or (resumed and goes_on and self.base):
            refuse_empty_average(trainer, trained=self._trained)
            with on_device(pl_module, trainer.strategy.root_device):  # Lightning has moved it to the CPU
                self._merge(trainer, pl_module)
        else:
            self._pending = False
            warnings.warn(
                "this fit trained nothing, so nothing was merged: use a new Trainer for every task "
                "(a Trainer that has reached max_epochs returns at once"
                + (", also where ckpt_path is of an earlier task)" if trainer.ckpt_path is not None else ")"),
                RuntimeWarning,
                stacklevel=2,
            )

    def _merge(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fold the trained weights into every merger; if they cannot be merged, no merger is changed."""
        before = list(self.vectors)
        given = (
            provided(self.required_statistics, trainer, pl_module, self.base) if self._given is None else self._given
        )
        others = unmerged_parameters(pl_module, self.base, self.include, self.exclude)
        if left := self._frozen.changed() + [name for name, tensor in others.items() if tensor.requires_grad]:
            warnings.warn(
                f"this fit changed {len(left)} parameters that are not merged, the first {left[0]!r}: they were "
                "frozen, or not there, when it started; make them trainable from the start, or name them in exclude=",
                RuntimeWarning,
                stacklevel=2,
            )
        # A run killed after its merge has written this vector already.
        again = trainer.ckpt_path is not None and self._goes_on is not False
        self.commit(
            self.task_vector(pl_module), pl_module, trainer, given=given, steps=trainer.global_step, again=again
        )
        self._pending, self._given = False, None
        if before and self.vectors[-1] in before:
            warnings.warn(
                f"the vector of task {self.num_tasks - 1} is that of task {before.index(self.vectors[-1])}: nothing "
                "that this fit trained is left in the model; give every Trainer new callbacks (an average of weights "
                "that was used in an earlier fit puts the earlier weights back)",
                RuntimeWarning,
                stacklevel=2,
            )
        if self.save_state:
            keep_merge(trainer, self.state_key, self.state_dict(), before=before)
            trainer.strategy.barrier("checkpoints")

    def commit(
        self,
        tau: Mapping[str, Tensor],
        model: LightningModule,
        trainer: Trainer,
        *,
        given: Statistics | None = None,
        steps: int,
        again: bool = False,
    ) -> None:
        """Fold the vector of a finished task into every merger, and store it in the bank; every ``fit`` calls this.

        Args:
            tau: The task vector.
            model: The model, as for ``fold``.
            trainer: The Trainer, which knows the rank of this process.
            given: Statistics, as for ``fold``.
            steps: Optimizer steps of the task.
            again: Whether the bank may already hold the vector, after an interruption.
        """
        started = time.perf_counter()
        if self.hand_over is not None:
            self.hand_over(self.measured(CheckedVector(tau), model, given), steps)
            self.num_tasks += 1
            return
        task, counts = self.task, {"steps": steps, "samples": self._task_samples}

        def store(tau: State) -> None:
            # On all ranks: sharded factors are gathered.
            factors = {} if self.bank is None else read_factors(model, self.base, origin=self._base_origin)
            if self.bank is not None and trainer.is_global_zero:
                name, base = self._task_name or f"task_{task:03d}", self.base_fingerprint
                self.bank.append(task, tau, name=name, base=base, counts=counts, factors=factors, overwrite=again)
            trainer.strategy.barrier("bank")

        self.fold(CheckedVector(tau), model, task=task, given=given, store=store)
        self._task_name = self._task_samples = self._task_index = None
        if trainer.world_size > 1:
            check_same_on_all_ranks(trainer, [merger.compute() for merger in self.mergers.values()])
        self.seconds = time.perf_counter() - started

    # State -------------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.accumulators() | {"pending": self._pending} if self.save_state else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        if self._stage is None:  # not called by a Trainer
            self.load_accumulators(state_dict)
        elif self._stage == "fit":
            taken = self.go_on_from(state_dict)
            self._goes_on = taken and bool(state_dict.get("pending", True))
        else:
            self._restored = state_dict

    @override
    def _leave(self, trainer: Trainer) -> None:
        super()._leave(trainer)
        self._stage = None
        self._restored = {}
