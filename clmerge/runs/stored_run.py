"""A finished run, opened to merge its task vectors again without training."""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.checkpoints.merge import remaining_tasks
from clmerge.deploy.predictors import Predictor
from clmerge.deploy.routing import Routing
from clmerge.deploy.running_merge import RunningMerge
from clmerge.evaluation.evaluate import Split
from clmerge.evaluation.evaluator import Rows
from clmerge.evaluation.probes import Probe
from clmerge.evaluation.probes.measuring import needs_gradient
from clmerge.merging import Merger, Statistics, WeightAverage
from clmerge.merging.checks import Shapes, num_entries
from clmerge.results.results import Results, Setting
from clmerge.results.run_folder import RunFolder
from clmerge.runs.branching import uploads_of
from clmerge.runs.final_predictors import FinalPredictors
from clmerge.runs.session import Session
from clmerge.runs.trainers import TrainerFactory, Trainers
from clmerge.streams import AdaptationData, Stream, StreamDataModule
from clmerge.training.module import ContinualClassifier
from clmerge.weights import TaskVectorBank, load_tensors, save_tensors
from clmerge.weights.parametrization import own_names, running_statistics


class StoredRun(Session):
    """Restore the models of a finished run: theta_0, every expert, every merged model.

    Args:
        folder: The run folder; nothing in it is changed.
        stream: The stream of the run.
        module: A new classifier of its configuration.
        data: Its data module.
        trainer: Builds Trainers with the run's settings, for one process.
        config: Its configuration, as plain values.
        name: Name of the run in the results.
        mergers: Its mergers by name, with no task folded in.
        evaluation: Which reading of the logits is used by searches, scores and the table; default that of the run.
        adaptation: Images that mergers and routings learn on; default the validation images, unlabelled.
        progress: Whether to show progress bars.
        merges_again: Whether task vectors are needed, to merge them again.
        routings: Its routings, with nothing collected.

    Attributes:
        models: The run's models after its last task.
        base: theta_0 by parameter name.
        base_statistics: Running statistics of the model before the first task.
        bank: The task vectors.
        trainers: Builds Trainers.
        kept: Indices of the tasks that are merged and counted; all of them unless some are left out.
        scratch: Folder that caches computed files, if there is one.
        results: Results of ``fit``.
        identity: A hash that identifies this run.

    Raises:
        ValueError: If the run is not finished, has kept no task vectors, or was made with another stream.
    """

    def __init__(
        self,
        folder: RunFolder,
        stream: Stream,
        module: ContinualClassifier,
        data: StreamDataModule,
        *,
        trainer: TrainerFactory,
        config: Mapping[str, Any],
        name: str,
        mergers: Mapping[str, Merger],
        evaluation: Setting | None = None,
        adaptation: AdaptationData | None = None,
        progress: bool = False,
        merges_again: bool = True,
        routings: Sequence[Routing] = (),
    ) -> None:
        super().__init__(
            stream,
            module,
            data,
            seed=config["seed"],
            evaluation=evaluation or config["learner"]["evaluation"],
            statistics_images=config["learner"]["statistics_images"],
            adaptation=adaptation,
        )
        self.folder, self.config, self.name = folder, config, name
        self.scratch: Path | None = None
        self.trainers = Trainers(trainer, folder, [], progress=progress)
        if not folder.manifest.finished:
            raise ValueError(f"expected a finished run, got {folder.path}: `clmerge fit --resume {folder.path}` first")
        self.results = Results.from_dict(folder.manifest.results)
        self.results.evaluation = self.evaluation
        self.kept = list(range(len(self.tasks)))
        if [task.name for task in self.tasks] != self.results.tasks:
            raise ValueError(
                f"expected the stream of {folder.path} ({self.results.tasks}), got other tasks: other data?"
            )
        weights, self.base = folder.load_weights()
        self.bank = TaskVectorBank(folder.bank)
        self._reader = RunningMerge(WeightAverage(), base=self.base or None)
        if merges_again:
            self._check_bank()
        text = json.dumps([folder.manifest.results, self.bank.base], sort_keys=True)
        self.identity = hashlib.sha256(text.encode()).hexdigest()[:16]
        data.setup_stream(stream, module.backbone.train_transform, module.backbone.eval_transform)
        self.base_statistics = running_statistics(module)
        self._blank_head = None
        if not module.head.open_vocabulary:
            module.head.build(module.backbone, len(stream.class_names), ())
            self._blank_head = copy.deepcopy(module.head)
        module.load_state_dict(weights)  # the text head comes with them
        buffers = config["learner"]["buffers"]
        self.models = FinalPredictors(
            folder, mergers, buffers=buffers, statistics=self.base_statistics, routings=routings
        )

    @property
    @override
    def uploads(self) -> int:
        learner = self.config["learner"]
        return uploads_of(learner["branches"], learner["rounds"], learner["branch_fraction"])

    @property
    def shapes(self) -> Shapes:
        """Shapes of the merged parameters by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.base.items()}

    @property
    def num_parameters(self) -> int:
        """Number of entries of one task vector."""
        return num_entries(self.shapes)

    @cached_property
    def device(self) -> torch.device:
        """Device on which the run's Trainers put the module."""
        return self.trainers.for_evaluation("").strategy.root_device

    def leave_out(self, without: Sequence[str]) -> None:
        """Merge and count the other tasks only.

        Args:
            without: Tasks, by name or index.

        Raises:
            ValueError: If there is no such task, or no task is left.
        """
        self.kept = remaining_tasks([task.name for task in self.tasks], without)

    def counted(self, row: Sequence[float]) -> list[float]:
        """Return the accuracies on the tasks that are kept, of a row with one for every task."""
        return [row[task] for task in self.kept]

    def enter(self, task: int) -> None:
        """Load the head and the running statistics of the run after a task into the module.

        Args:
            task: Index of the task.

        Raises:
            ValueError: If the run has not kept them.
        """
        self.module.to(self.device)  # a Trainer leaves it on the CPU
        self.data.task = task
        self.module.resume_tasks([t.classes for t in self.tasks[: task + 1]])
        file = self.folder.unmerged(task)
        kept = load_tensors(file) if file.is_file() else {}
        if self._blank_head is not None:
            if not any(name.startswith("head.") for name in kept):
                raise ValueError(
                    f"expected the head of task {task} in {file}, got none: run `clmerge fit` anew to keep it"
                )
            self.module.head = copy.deepcopy(self._blank_head).to(self.device)
        own = own_names(self.module)
        kept = {own.get(name, name): tensor for name, tensor in kept.items()}
        if unexpected := self.module.load_state_dict(kept, strict=False).unexpected_keys:
            raise ValueError(f"expected tensors of {type(self.module).__name__} in {file}, got {unexpected[0]!r}")

    def expert(self, task: int) -> dict[str, Tensor]:
        """Return the weights of one task's expert, theta_0 + tau, by the module's names."""
        return self.weights_with(self.bank[task])

    def weights_with(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return theta_0 plus a vector, given by dense names, by the module's names."""
        return self._reader.weights_with(vector, self.module)

    def predictor(self, name: str) -> Predictor:
        """Return the predictor of a model after the last task, whose head and running statistics the module then has.

        Args:
            name: One of ``models.names``, or a merger by its class.

        Raises:
            ValueError: If the run has no such model.
        """
        self.module.to(self.device)  # a Trainer leaves it on the CPU
        self.data.task = len(self.tasks) - 1
        self.module.resume_tasks([task.classes for task in self.tasks])
        if self._blank_head is not None:
            self.module.head = copy.deepcopy(self._blank_head).to(self.device)
        return self.models.predictor(name, self.module)

    def measure_again(self, needed: Set[str], task: int) -> Statistics:
        """Measure statistics of a task on the module's current weights, exactly as ``fit`` does.

        Args:
            needed: Names of statistics.
            task: Index of the task.

        Raises:
            ValueError: If steps are needed but unknown.
        """
        num_steps = self.bank.metadata(task).get("steps")
        if "steps" in needed and num_steps is None:
            raise ValueError(
                f"expected the optimizer steps of task {task} in {self.bank.path(task)}, got none: an older version "
                "wrote it; run `clmerge fit` anew, or leave out mergers that require steps"
            )
        measured: dict[str, Mapping[str, Tensor] | float] = {
            name: kept for name in needed if (kept := self._read_statistic(name, task)) is not None
        }
        if missing := needed - measured.keys():
            measured |= self.measure(missing, task, base=self.base, num_steps=int(num_steps or 0))
            self._write_statistics({name: measured[name] for name in missing}, task)
        return measured

    def _statistic_file(self, name: str, task: int) -> Path | None:
        return None if self.scratch is None else self.scratch / f"{name}_{task:03d}.safetensors"

    def _read_statistic(self, name: str, task: int) -> Mapping[str, Tensor] | None:
        file = self._statistic_file(name, task)
        return load_tensors(file) if file is not None and file.is_file() else None

    def _write_statistics(self, statistics: Statistics, task: int) -> None:
        """Store measured tensors for other searches and orders."""
        for name, value in statistics.items():
            if isinstance(value, Mapping) and (file := self._statistic_file(name, task)) is not None:
                save_tensors(file, value)

    def use_scratch(self, folder: Path, *, image_memory: int) -> None:
        """Cache decoded images and statistics in a folder until it is removed.

        Args:
            folder: An empty folder.
            image_memory: MiB of images that are kept in memory instead.
        """
        self.scratch = folder
        self.data.cache_eval = True
        self.data.cache_mb = image_memory
        self.data.keep_images(folder)

    def evaluate_again(
        self,
        label: str,
        predictors: Mapping[str, Predictor],
        task: int,
        split: Split = "test",
        *,
        confusion: bool = False,
        probes: Sequence[Probe] = (),
        weights: Mapping[str, Callable[[], Mapping[str, Tensor]]] | None = None,
        last: bool = True,
    ) -> Rows:
        """Return the accuracies of several models on all tasks, exactly as ``fit`` does after a task.

        Args:
            label: Text of the progress bar.
            predictors: Predictors by name.
            task: The latest task that was merged; a head that grows has no accuracy on later ones.
            split: Which images.
            confusion: Whether answers are counted by class, too.
            probes: Probes of the models.
            weights: Returns the merged parameters of a model, dense, by its name.
            last: Whether no task follows, for probes.
        """
        trainer = self.trainers.for_evaluation(label, gradients=needs_gradient(probes))
        probing = self.probing(probes, task, weights=weights, base=self.base, last=last)
        return self.evaluate(trainer, predictors, task, split=split, confusion=confusion, probing=probing)

    def _check_bank(self) -> None:
        if not self.base:
            raise ValueError(
                f"expected a run that trained what can be merged, got {self.folder.path}: its backbone is frozen"
            )
        size = sum(tensor.nbytes for tensor in self.base.values())
        if self.bank.tasks != list(range(len(self.tasks))):
            found = f"{len(self.bank)} of {len(self.tasks)}" if len(self.bank) else "none"
            raise ValueError(
                f"expected the task vectors of all {len(self.tasks)} tasks in {self.bank.folder}, got {found}. Train "
                "with --learner.keep_task_vectors=true (the default) to keep them: it costs "
                f"{size / 1e6:,.1f} MB per task for this model, {size * len(self.tasks) / 1e6:,.1f} MB for this stream"
            )
        if self.bank.base not in (None, self._reader.base_fingerprint):
            raise ValueError(
                f"expected task vectors of the base model of {self.folder.path}, got others in {self.bank.folder}"
            )
