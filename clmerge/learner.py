"""The outer loop over a stream: train a task, merge, evaluate everything, commit, go on; resume where it stopped."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from torch import Tensor

from clmerge.calibration import CalibratedModels, Calibration
from clmerge.callbacks import MergeCallback
from clmerge.callbacks.progress import matrix_lines, trainable_line
from clmerge.callbacks.provided import PROVIDED
from clmerge.evaluation import Rows, accuracy_on, evaluate
from clmerge.final_models import save_models
from clmerge.learner_checks import check_learner
from clmerge.lightning_compat import quiet_lightning
from clmerge.loggers import finish_loggers, log_artifacts, log_summary, log_task
from clmerge.merging import Merger, Statistics, WeightAverage
from clmerge.modules import ContinualClassifier
from clmerge.notices import add_place, notices
from clmerge.plots import plot_files, save_plots
from clmerge.regularized_tasks import RegularizedTasks
from clmerge.results import EXPERT, ZERO_SHOT, Results
from clmerge.resume import restore
from clmerge.run_folder import RunFolder
from clmerge.streams import Stream, StreamDataModule
from clmerge.task_statistics import measure, training_images
from clmerge.task_training import TaskTraining
from clmerge.trainers import TrainerFactory, Trainers
from clmerge.weights.batch_norm import Buffers
from clmerge.weights.parametrization import running_statistics


class Learner:
    """Train a stream task by task with several mergers riding along, and commit to a run folder after every step.

    For every task a new Trainer with fresh callbacks; the model, the loggers and the MergeCallback survive. After
    every task all models (each merger, and the un-merged expert) are evaluated on all tasks of the stream.

    Args:
        stream: The tasks.
        module: The classifier to train.
        mergers: Mergers that ride on the run, as for ``MergeCallback``; none does where the backbone is frozen.
        data: The data module; batch sizes and workers.
        start_policy: Where every task starts: ``base`` (the pretrained weights), ``previous`` (the un-merged weights of
            the task before) or ``merged`` (a merged model, see ``start_from``).
        epochs: Epochs of every task, where they differ; default the Trainer's ``max_epochs`` for all.
        deploy: Merger whose model is the result, or ``expert`` for the un-merged one; default the first merger.
        start_from: Merger whose model is the start under ``merged``, for instance a moving average (``wise_ft``);
            default the deployed one.
        branches: Branches of every task: models that start alike, each trained on its own part of the task's images,
            and are merged into the task's model (Branch-and-Merge, arXiv 2407.08699).
        rounds: How often a task branches and merges; every round starts from the merge of the one before (ColD
            Fusion, arXiv 2212.01378).
        branch_merger: Merges branches, as vectors from where they started; default ``WeightAverage``.
        buffers: Running statistics of merged models: of the ``latest`` task, of the ``base``, their ``mean``, or
            ``re-estimated`` for each of them on the task's training images.
        accumulators: Where base and accumulators live: ``cpu``, or ``model`` for the parameters' device.
        keep_task_vectors: Whether every task vector is kept in the run folder, for merging again later. Costs four
            bytes per trained parameter and task on disk; mergers that need them all then keep no copies in memory.
        statistics_images: Training images per task that Fisher information, Gram matrices and losses are measured on,
            for mergers that require them, and running statistics if they are re-estimated.
        evaluation: Whether tables, the star, mergers that need a score and searches go by ``task_agnostic`` accuracy
            (all classes compete) or ``task_aware`` (only those of the image's task do); default that of the stream.
        calibrations: What is done to merged models after every task; each gives models of its own, ``magmax+tuned``.
        seed: Seed of initialisation, order of samples, augmentation and dropout, each fixed per task.

    Attributes:
        branch_steps: Optimizer steps of all branches of the task that is merged, None where it has none.

    Raises:
        ValueError: If settings do not fit the stream, the model or each other; see ``check_learner``.
    """

    def __init__(
        self,
        stream: Stream,
        module: ContinualClassifier,
        mergers: Merger | Sequence[Merger] | Mapping[str, Merger],
        data: StreamDataModule,
        *,
        start_policy: Literal["base", "previous", "merged"] = "previous",
        epochs: list[int] | None = None,
        deploy: str | None = None,
        start_from: str | None = None,
        branches: int = 1,
        rounds: int = 1,
        branch_merger: Merger | None = None,
        buffers: Buffers = "latest",
        accumulators: Literal["cpu", "model"] = "cpu",
        keep_task_vectors: bool = True,
        statistics_images: int = 256,
        evaluation: Literal["task_agnostic", "task_aware"] | None = None,
        calibrations: list[Calibration] | None = None,
        seed: int = 0,
    ) -> None:
        self.stream = stream
        self.tasks = stream.tasks  # reads the labels: missing data is found before anything is written
        self.prompts = stream.class_prompts if module.head.open_vocabulary else []  # and missing templates
        self.module = module
        self.data = data
        self.seed = seed
        self.epochs = epochs
        self.branches, self.rounds = branches, rounds
        self.branch_merger = branch_merger or WeightAverage()
        self.branch_steps: int | None = None
        self.keep_task_vectors = keep_task_vectors
        self.statistics_images = statistics_images
        self.evaluation = evaluation or stream.evaluation
        self.merge = MergeCallback(
            mergers,
            start_policy=start_policy,
            deploy=deploy,
            start_from=start_from,
            include=module.trained_names,
            buffers=buffers,
            device=accumulators,
            score=self._validation_score,
            statistics=self._statistics,
            images=self._images,
            seed=seed,
            save_state=False,  # the run folder keeps accumulators; in every epoch's checkpoint they would be a burden
        )
        self.calibrated = CalibratedModels(calibrations or [], module, data, seed=seed)
        self.regularized = RegularizedTasks(module, data, num_images=statistics_images, seed=seed)
        # A frozen backbone leaves nothing to merge: the head alone is trained, if at all, and evaluated.
        self.mergers = self.merge.mergers if module.trained_names else {}
        check_learner(self)

    def fit(
        self,
        run: RunFolder,
        *,
        trainer: TrainerFactory = Trainer,
        loggers: Sequence[Logger] = (),
        report: Callable[[Results], None] | None = None,
        progress: bool | None = None,
        artifacts: bool = False,
    ) -> Results:
        """Train what the run folder lacks, and return the results of the whole stream.

        Args:
            run: A new run, or one that was interrupted.
            trainer: Builds a new Trainer with fresh callbacks from the keyword arguments it is given.
            loggers: Lightning loggers for the whole stream.
            report: Called with the results after every evaluated task.
            progress: Whether to show progress bars instead of a line per epoch; default where stderr is a terminal.
            artifacts: Whether W&B gets base, task vectors and merged models as artifacts in the end.

        Raises:
            ValueError: If task vectors shall become artifacts and there will be none.
        """
        if artifacts:
            self.require_task_vectors()
        progress = sys.stderr.isatty() if progress is None else progress
        trainers = Trainers(trainer, run, loggers, progress=progress)
        quiet_lightning()
        seed_everything(self.seed, workers=True, verbose=False)
        backbone = self.module.backbone
        self.data.setup_stream(self.stream, backbone.train_transform, backbone.eval_transform)
        self.module.begin_stream(len(self.stream.class_names), self.prompts)
        if self.keep_task_vectors:
            self.merge.use_bank(run.bank)
        results = restore(self, run)
        if run.writes:
            matrices = matrix_lines(self.module, self.mergers) if self.mergers else ()  # a frozen backbone has none
            for line in (trainable_line(self.module), *matrices, *notices(self.module, self.stream)):
                print(line, file=sys.stderr, flush=True)
        told = loggers if run.writes else ()  # the Trainer's part of logging needs the same loggers on every rank
        deployed = self.merge.deploy if self.mergers else EXPERT
        training = TaskTraining(self, run, trainers)
        success = False
        try:
            if not run.manifest.results:
                self._evaluate_zero_shot(run, trainers, results)
            for task in range(results.num_finished):
                # A killed run's loggers may lack what the manifest has.
                log_task(told, results, task, deployed=deployed)
            for task in range(run.manifest.evaluated, len(self.tasks)):
                if run.manifest.trained == task:
                    training.train(results, task)
                self._evaluate(run, trainers, results, task)
                log_task(told, results, task, deployed=deployed)
                if report is not None:
                    report(results)
            if not (run.manifest.finished and self._has_views(run, results)):
                self._finish(run, trainers, results)
            log_summary(told, results, deployed=deployed)
            if artifacts:
                log_artifacts(told, run, results)
            success = True
        except Exception as error:
            add_place(error, run, self.tasks)
            raise
        finally:
            finish_loggers(told, success=success)
        return results

    def require_task_vectors(self) -> None:
        """Raise a ValueError unless the run will keep task vectors."""
        if not (self.keep_task_vectors and self.mergers):
            raise ValueError(
                "expected a run that keeps task vectors, for logging.artifacts, got "
                + ("keep_task_vectors=false; set it to true" if self.mergers else "a frozen backbone, which has none")
            )

    # Evaluation ----------------------------------------------------------------------------------------------------

    def _evaluate(self, run: RunFolder, trainers: Trainers, results: Results, task: int) -> None:
        started = time.perf_counter()
        weights = self.merged()
        weights |= self.calibrated.models(weights, task, trainers.device)
        # theta_0 + tau is what the bank can give back: compare finds the same bits.
        expert = self.merge.weights_with(self.merge.task_vector(self.module), self.module)
        rows = self._rows(trainers, f"evaluating {len(weights) + 1} models", {**weights, EXPERT: expert})
        for name, row in rows.items():
            # A head that grows has no logits for the classes of tasks to come.
            known = len(self.tasks) if self.module.head.open_vocabulary else task + 1
            unknown = [math.nan] * (len(self.tasks) - known)
            results.add_row(name, row["task_agnostic"][:known] + unknown, row["task_aware"][:known] + unknown)
        results.add_seconds("evaluate", time.perf_counter() - started)
        run.manifest.evaluated = task + 1
        run.manifest.results = results.to_dict()
        run.commit()

    def _evaluate_zero_shot(self, run: RunFolder, trainers: Trainers, results: Results) -> None:
        started = time.perf_counter()
        if self.module.head.open_vocabulary:
            row = self._rows(trainers, "evaluating zero-shot", {ZERO_SHOT: None})[ZERO_SHOT]
            results.set_zero_shot(row["task_agnostic"], row["task_aware"])
        results.add_seconds("evaluate", time.perf_counter() - started)
        run.manifest.results = results.to_dict()
        run.commit()

    def _has_views(self, run: RunFolder, results: Results) -> bool:
        """Whether the models and pictures of a finished run are there; a ``False`` makes them again."""
        models = [run.model(name) for name in self.mergers]
        return all(file.is_file() for file in [*models, *plot_files(results, run.plots)])

    def _finish(self, run: RunFolder, trainers: Trainers, results: Results) -> None:
        more = dict(self.calibrated.final(self.merged(), len(self.tasks) - 1, trainers.device))  # on all ranks
        if run.writes:
            save_models(run, self.module, self.merge, list(self.mergers), more)
            save_plots(results, run.plots)
        run.manifest.finished = True
        run.manifest.results = results.to_dict()
        run.commit()

    # Parts -------------------------------------------------------------------------------------------------------

    def _rows(self, trainers: Trainers, label: str, weights: Mapping[str, Mapping[str, Tensor] | None]) -> Rows:
        return evaluate(
            trainers.for_evaluation(label),
            self.module,
            weights,
            self.data,
            task_classes=[task.classes for task in self.tasks],
            num_classes=len(self.stream.class_names),
        )

    def merged(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights of every merged model, by the module's own names."""
        merge = self.merge
        return {name: merge.state_with(merge.merged_vector(name), self.module, merger=name) for name in self.mergers}

    def unmerged(self) -> dict[str, Tensor]:
        """Return what is trained but never merged: a head that learns its classes, and running statistics."""
        learned = not self.module.head.open_vocabulary
        head = {f"head.{name}": tensor for name, tensor in self.module.head.state_dict().items()} if learned else {}
        return {**head, **running_statistics(self.module, counts=True)}

    def _statistics(self, module: LightningModule) -> Statistics:
        """Measure what mergers may require of the task that was just trained."""
        assert isinstance(module, ContinualClassifier)
        return measure(
            self.merge.required_statistics - PROVIDED,
            module,
            self.data,
            self.data.task,
            base=self.merge.base,
            num_steps=module.trainer.global_step if self.branch_steps is None else self.branch_steps,
            num_images=self.statistics_images,
            seed=self.seed,
        )

    def _images(self, module: LightningModule) -> Iterator[Tensor]:
        num_images = self.statistics_images
        return training_images(self.module, self.data, self.data.task, num_images=num_images, seed=self.seed)

    @torch.no_grad()
    def _validation_score(self, module: LightningModule) -> float:
        assert isinstance(module, ContinualClassifier)
        own = [task.classes for task in self.tasks] if self.evaluation == "task_aware" else None
        return accuracy_on(module, self.data.eval_dataloader("val", range(self.merge.num_tasks + 1)), own)
