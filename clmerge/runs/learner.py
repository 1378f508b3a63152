"""The outer loop over a stream: train a task, merge, evaluate, commit; resumes after an interruption."""

import sys
import time
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import Logger

from clmerge.callbacks.progress import Pace, matrix_lines, trainable_line
from clmerge.deploy.predictors import Merged, Predictor
from clmerge.evaluation.probes.measuring import add_findings, needs_gradient
from clmerge.figures import plot_files, save_plots
from clmerge.lightning_compat import quiet_lightning
from clmerge.loggers import finish_loggers, log_artifacts, log_summary, log_task
from clmerge.merging.checks import num_entries
from clmerge.names import tell
from clmerge.results.results import EXPERT, SETTINGS, ZERO_SHOT, Results
from clmerge.results.run_folder import RunFolder
from clmerge.runs.final_models import save_models
from clmerge.runs.launching.branch_jobs import BranchJobs, check_branched
from clmerge.runs.launching.task_jobs import TaskJobs, check_apart
from clmerge.runs.learner_parts import LearnerParts
from clmerge.runs.notices import adaptation_lines, add_place, notices, view_lines
from clmerge.runs.resume import restore
from clmerge.runs.task_training import TaskTraining
from clmerge.runs.trainers import TrainerFactory, Trainers
from clmerge.search.grid import with_values
from clmerge.weights import State, TaskVectorBank, apply_task_vector


class Learner(LearnerParts):
    """Train a stream task by task, update every merger after each task, and commit every step to a run folder.

    Every task gets a new Trainer with new callbacks; the model, the loggers and the MergeCallback are kept. After
    every task all models (each merger, and the un-merged expert) are evaluated on all tasks of the stream. The
    constructor's arguments are documented in ``LearnerParts``.
    """

    def fit(
        self,
        run: RunFolder,
        *,
        trainer: TrainerFactory = Trainer,
        loggers: Sequence[Logger] = (),
        report: Callable[[Results], None] | None = None,
        progress: bool | None = None,
        artifacts: bool = False,
        jobs: TaskJobs | BranchJobs | None = None,
        training: Callable[[LearnerParts, RunFolder, Trainers], TaskTraining] | None = None,
        until: int | None = None,
    ) -> Results:
        """Train and evaluate the tasks that the run folder lacks, and return the results of the whole stream.

        Args:
            run: A new run, or one that was interrupted.
            trainer: Builds a new Trainer with new callbacks from keyword arguments.
            loggers: Lightning loggers for the whole stream.
            report: Called with the results after every evaluated task.
            progress: Whether to show progress bars instead of a line per epoch; default where stderr is a terminal.
            artifacts: Whether to log base, task vectors and merged models to W&B as artifacts at the end.
            jobs: Train the tasks apart from each other, or the branches of one task after the other, in place of this
                process; the results have the same bits.
            training: Makes what obtains the tasks in place of training them here.
            until: Number of tasks after which the run is left for another fit to go on with; default all.

        Raises:
            ValueError: If artifacts are requested and the run will keep no task vectors, or jobs are to train tasks
                that depend on each other, or branches where there are none.
        """
        if artifacts:
            self.require_task_vectors()
        if isinstance(jobs, TaskJobs):
            check_apart(self)
        elif jobs is not None:
            check_branched(self)
        progress = sys.stderr.isatty() if progress is None else progress
        trainers = Trainers(trainer, run, loggers, progress=progress)
        self._begin()
        if self.keep_task_vectors:
            self.merge.bank = TaskVectorBank(run.bank)
        results = restore(self, run)
        if run.writes:
            matrices = matrix_lines(self.module, self.mergers) if self.mergers else ()  # a frozen backbone has none
            views = view_lines(self.mergers)
            adapted = adaptation_lines(self.learning, self.adaptation)
            for line in (trainable_line(self.module), *matrices, *views, *adapted, *notices(self.module, self.stream)):
                tell(line)
        told = loggers if run.writes else ()  # but the Trainer needs the same loggers on every rank
        deployed = self.merge.deploy if self.mergers else EXPERT
        tasks = training(self, run, trainers) if training else TaskTraining(self, run, trainers, jobs)
        success = False
        try:
            if not run.manifest.results:
                self._evaluate_zero_shot(run, trainers, results)
            for task in filter(self.is_evaluated, range(results.num_finished)):
                # The loggers of a killed run may lack metrics that the manifest has.
                log_task(told, results, task, deployed=deployed)
            if isinstance(jobs, TaskJobs):
                jobs.start(range(run.manifest.trained, len(self.tasks)))
            pace = Pace(len(self.tasks), results.seconds)
            for task in range(run.manifest.evaluated, len(self.tasks) if until is None else until):
                if run.manifest.trained == task:
                    tasks.train(results, task)
                if self.is_evaluated(task):
                    self._evaluate(run, trainers, results, task)
                    log_task(told, results, task, deployed=deployed)
                    if report is not None:
                        report(results)
                else:
                    self._skip(run, results, task)
                if run.writes:
                    tell(pace.line(task, results.seconds))
            complete = run.manifest.evaluated == len(self.tasks)
            if complete and not (run.manifest.finished and self._has_views(run, results)):
                self._finish(run, trainers, results)
            log_summary(told, results, deployed=deployed)
            if artifacts:
                log_artifacts(told, run, results)
            success = True
        except Exception as error:
            add_place(error, run, self.tasks)
            raise
        finally:
            if jobs is not None:
                jobs.close()
            finish_loggers(told, success=success)
        return results

    def train_apart(
        self,
        run: RunFolder,
        task: int,
        *,
        branch: int | None = None,
        whole: RunFolder | None = None,
        trainer: TrainerFactory = Trainer,
        loggers: Sequence[Logger] = (),
    ) -> None:
        """Train one task, or a branch of it, in a run folder of its own, from where it was interrupted.

        Args:
            run: Folder of the job; ``trained.pt``, which another process merges, appears there at the end.
            task: Index of the task.
            branch: Number of the task's fits before this one; default the whole task is trained.
            whole: Folder of the run, which holds the start of the branch.
            trainer: As for ``fit``.
            loggers: Lightning loggers.

        Raises:
            ValueError: If the task depends on the one before.
        """
        if branch is None:
            check_apart(self)
        self._begin()
        try:
            training = TaskTraining(self, run, Trainers(trainer, run, loggers, progress=False))
            if branch is None:
                training.train_apart(task)
            else:
                assert whole is not None, "the start of a branch lies there"
                if self.keep_task_vectors:
                    self.merge.bank = TaskVectorBank(whole.bank)
                training.branches.train_apart(whole, task, branch)
        except Exception as error:
            add_place(error, run, self.tasks)
            raise
        finally:
            finish_loggers(loggers if run.writes else (), success=True)

    def _begin(self) -> None:
        """Seed everything, and set data and module up for the stream."""
        quiet_lightning()
        seed_everything(self.seed, workers=True, verbose=False)
        backbone = self.module.backbone
        self.data.setup_stream(self.stream, backbone.train_transform, backbone.eval_transform)
        self.module.begin_stream(len(self.stream.class_names), self.prompts)

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
        predictors: dict[str, Predictor] = {}
        seconds: dict[str, float | None] = {}
        for name in self.mergers:
            begun = time.perf_counter()
            predictors[name] = self.merge.predictor(name, self.module)
            update = self.merge.update_seconds.get(name)  # none if the run was interrupted between merge and evaluation
            seconds[name] = None if update is None else update + time.perf_counter() - begun
        if self.calibrated:
            merged = {name: one.state for name, one in predictors.items() if isinstance(one, Merged)}
            predictors |= self.calibrated.predictors(merged, task, trainers.device)
            for name, each in self.calibrated.seconds.items():
                before = seconds[name.rpartition("+")[0]]
                seconds[name] = None if before is None else before + each
        if self.routed:
            wanted = [name for found in self.routed.names(self.mergers).values() for name in found]
            tasks = list(range(task + 1))
            predictors |= self.routed.predictors(self.merge, wanted, tasks, trainers.device)
            for name, each in self.routed.seconds.items():
                before = seconds[name.rpartition("+")[0]]
                seconds[name] = None if before is None else before + each
        predictors[EXPERT] = Merged(self.expert())
        gradients = needs_gradient(self.probes)
        trainer = trainers.for_evaluation(f"evaluating {len(predictors)} models", gradients=gradients)
        last = task == len(self.tasks) - 1
        probing = self.probing(self.probes, task, weights=self._dense(), base=self.merge.base)
        rows = self.evaluate(trainer, predictors, task, on=self.evaluated_tasks(task), confusion=last, probing=probing)
        kept = self._bytes_kept(task)
        for name, row in rows.items():
            accuracies = (row[setting] for setting in SETTINGS)
            results.add_row(name, *accuracies, bytes_kept=kept[name], merge_seconds=seconds.get(name))
            if last:
                results.set_confusion(name, row["confusion"])
            if "routing_accuracy" in row:
                results.add_routing(name, row["routing_accuracy"])
            add_findings(results, name, row.get("probes", {}), self.probes)
        results.add_seconds("evaluate", time.perf_counter() - started)
        self._commit(run, results, task)

    def _dense(self) -> dict[str, Callable[[], State]]:
        """Return what computes the merged parameters of every model that is one set of weights."""
        if not self.mergers:
            return {}
        merge = self.merge
        own = lambda: apply_task_vector(merge.base, merge.task_vector(self.module))  # noqa: E731  one of many alike
        return {**merge.weights_by_name(self.mergers), EXPERT: own}

    def _skip(self, run: RunFolder, results: Results, task: int) -> None:
        """Add undefined rows for a task after which nothing is evaluated."""
        sizes = self._bytes_kept(task)
        results.add_skipped(sizes)
        run.manifest.evaluated = task + 1
        run.manifest.skipped.append(sizes)
        run.commit()

    def _commit(self, run: RunFolder, results: Results, task: int) -> None:
        run.manifest.evaluated = task + 1
        run.manifest.record(results)
        run.commit()

    def _evaluate_zero_shot(self, run: RunFolder, trainers: Trainers, results: Results) -> None:
        started = time.perf_counter()
        if self.module.head.open_vocabulary:
            trainer = trainers.for_evaluation("evaluating zero-shot", gradients=needs_gradient(self.probes))
            base = self.merge.base
            probing = self.probing(
                self.probes,
                len(self.tasks) - 1,
                weights={ZERO_SHOT: lambda: base} if base else {},
                base=base,
                last=True,
            )
            row = self.evaluate(trainer, {ZERO_SHOT: Merged()}, 0, confusion=True, probing=probing)[ZERO_SHOT]
            results.set_zero_shot(row["task_agnostic"], row["task_aware"])
            results.set_confusion(ZERO_SHOT, row["confusion"])
            add_findings(results, ZERO_SHOT, row.get("probes", {}), self.probes)
        results.add_seconds("evaluate", time.perf_counter() - started)
        run.manifest.record(results)
        run.commit()

    def _has_views(self, run: RunFolder, results: Results) -> bool:
        """Whether the models and pictures of a finished run exist; if not, they are made again."""
        routed = [
            name
            for label, found in self.routed.names(self.mergers).items()
            if not self.mergers[label].task_views
            for name in found
        ]
        models = [run.model(name) for name in (*self.mergers, *routed)]
        return all(file.is_file() for file in [*models, *plot_files(results, run.plots)])

    def _finish(self, run: RunFolder, trainers: Trainers, results: Results) -> None:
        more = dict(self.calibrated.final(self.merged(), len(self.tasks) - 1, trainers.device))  # on all ranks
        routed = self.routed.final(self.merge, list(range(len(self.tasks))), trainers.device) if self.mergers else {}
        if run.writes:
            save_models(run, self, more, routed)
            save_plots(results, run.plots)
        run.manifest.finished = True
        run.manifest.record(results)
        run.commit()

    def _bytes_kept(self, task: int) -> dict[str, int]:
        """Return the bytes that every model keeps beside the base model after a task."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.merge.base.items()} if self.mergers else {}
        # Vectors that a rule keeps count wherever they are: a fresh merger does not know of the bank.
        fresh = {name: with_values(merger, {}) for name, merger in self.mergers.items()}
        kept = {name: merger.state_size(shapes, task + 1) for name, merger in fresh.items()}
        more = {
            f"{name}+{kind}": kept[name] + one.nbytes(self.module, self.data, task)
            for name in self.mergers
            for kind, one in self.calibrated.calibrations.items()
        }
        if self.routed and self.mergers:
            frame = self.routed.frame(self.merge.base, torch.device("cpu"))
            for name, routed in self.routed.names(self.mergers).items():
                more |= {
                    label: kept[name] + self.routed.nbytes(one.name, frame, range(task + 1))
                    for label, one in routed.items()
                }
        return {**kept, **more, EXPERT: 4 * num_entries(shapes)}
