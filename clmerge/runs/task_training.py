"""Train the tasks of a run: one fit or several branches of every task, the merge, and the commit of both."""

import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from clmerge.results.results import Results
from clmerge.results.run_folder import RunFolder
from clmerge.runs.branch_training import BranchTraining
from clmerge.runs.fits import Fits
from clmerge.runs.launching.branch_jobs import BranchJobs
from clmerge.runs.launching.task_jobs import TaskJobs
from clmerge.runs.launching.trained import Trained
from clmerge.runs.learner_parts import LearnerParts
from clmerge.runs.trainers import Trainers
from clmerge.statistics.provided import provided
from clmerge.streams.replay import replay_memory


class TaskTraining:
    """Train one task after another of a learner's stream into a run folder.

    Args:
        learner: The learner with stream, module, data and merged models.
        run: The run folder.
        trainers: Builds the run's Trainers.
        jobs: Train the tasks, or the branches of every task, in place of this process, if there are any.
    """

    def __init__(
        self,
        learner: LearnerParts,
        run: RunFolder,
        trainers: Trainers,
        jobs: TaskJobs | BranchJobs | None = None,
    ) -> None:
        self.learner = learner
        self.run = run
        self.trainers = trainers
        self.jobs = jobs if isinstance(jobs, TaskJobs) else None
        self.fits = Fits(learner, run, trainers)
        self.branches = BranchTraining(learner, run, self.fits, jobs if isinstance(jobs, BranchJobs) else None)

    def train(self, results: Results, task: int) -> None:
        """Train a task, from its last checkpoint if there is one, merge it, and commit.

        Args:
            results: Receives the time and memory that training took.
            task: Index of the task.

        Raises:
            RuntimeError: If the fit ended without training.
        """
        learner, run = self.learner, self.run
        started, self.fits.elsewhere = time.perf_counter(), 0.0
        info = learner.tasks[task]
        learner.data.task = task
        self.fits.next_task(task)
        trainer = self._obtain(results, task)
        if learner.mergers and learner.merge.num_tasks != task + 1:
            raise RuntimeError(
                f"expected {task + 1} merged tasks after {info.name}, got {learner.merge.num_tasks}: the fit ended "
                "without training; set trainer.max_epochs to 1 or more"
            )
        results.bytes |= learner.regularized.end(trainer.strategy.root_device)
        if learner.trajectory is not None:
            results.bytes["trajectory"] = self.fits.trajectory_bytes
        if learner.data.replay:
            memory = replay_memory(learner.stream, task + 1, learner.data.replay, None, seed=learner.data.seed)
            results.bytes["replay"] = memory.nbytes
        if learner.learning:
            results.bytes["adaptation"] = learner.adaptation.nbytes(learner.data, range(task + 1))
        own = time.perf_counter() - started - learner.merge.seconds
        results.add_seconds("train", own + self.fits.elsewhere)
        results.add_seconds("merge", learner.merge.seconds)
        if learner.calibrated:
            device = trainer.strategy.root_device
            results.bytes |= learner.calibrated.collect(learner.merged(), task, device, expert=learner.expert)
        if learner.routed and learner.mergers:
            tau = learner.merge.task_vector(learner.module)
            results.bytes |= learner.routed.collect(learner.merge.base, tau, task, trainer.strategy.root_device)
        # The accuracies are those of the latest evaluation; of a long stream they take seconds to write down.
        run.manifest.results |= {"seconds": dict(results.seconds), "bytes": dict(results.bytes)}
        trainer.strategy.barrier("trained")
        if learner.keep_task_vectors:
            run.keep_unmerged(task, learner.unmerged())
        accumulators = learner.merge.accumulators() | {
            "calibration": learner.calibrated.state_dict(),
            "routing": learner.routed.state_dict(),
        }
        run.commit_state(task, learner.module.state_dict(), accumulators)

    def _obtain(self, results: Results, task: int) -> Trainer:
        """Train a task here or take over what a job has trained, and merge it; return the Trainer of its device."""
        learner, fits = self.learner, self.fits
        if self.jobs is not None:
            return self._adopt(self.jobs, task)
        if learner.mergers and learner.branches > 1:
            return self.branches.train(task)
        if learner.mergers:
            return self._fit_merging(task)
        trainer = fits.trainer(task)
        fits.begin(trainer, task)
        if any(parameter.requires_grad for parameter in learner.module.parameters()):
            fits.fit(trainer, task)
        return trainer

    def _fit_merging(self, task: int) -> Trainer:
        """Train a task in one fit, at whose end the callback merges it."""
        learner, fits = self.learner, self.fits
        trainer = fits.trainer(task, callbacks=[learner.merge])
        fits.begin(trainer, task)
        # Before a checkpoint is restored, whose weights are already trained: theta_0 is the weights before training.
        learner.merge.take_base(learner.module)
        fits.fit(trainer, task)
        return trainer

    def train_apart(self, task: int) -> None:
        """Train a task, and write down what another process needs to merge it.

        Args:
            task: Index of the task.
        """
        learner, merge = self.learner, self.learner.merge
        started = time.perf_counter()
        self.fits.only_task = True
        handed: list[tuple[Mapping[str, Any], int]] = []
        merge.hand_over = lambda statistics, steps: handed.append((statistics, steps))
        learner.data.task = task
        if task:
            learner.module.resume_tasks([one.classes for one in learner.tasks[:task]])
        self.fits.next_task(task, index=task)
        trainer = self._fit_merging(task) if learner.branches == 1 else self.branches.train(task)
        if not handed:
            raise RuntimeError(f"expected a fit that trains task {task}, got none: set trainer.max_epochs to 1 or more")
        if self.run.writes:
            statistics, steps = handed[-1]
            kept = {name: value for name, value in statistics.items() if name != "weights"}  # which are theta_0
            self.fits.hand_over(task, None, merge.base_fingerprint or "", kept, steps=steps, started=started)
        trainer.strategy.barrier("trained")

    def _adopt(self, jobs: TaskJobs, task: int) -> Trainer:
        """Take over a task that a job has trained, and merge it."""
        learner, merge = self.learner, self.learner.merge
        begun = time.perf_counter()
        file = jobs.wait(task)
        waited = time.perf_counter() - begun
        trainer = self.fits.trainer(task)
        self.fits.begin(trainer, task)
        merge.take_base(learner.module)
        device = next(iter(merge.base.values())).device
        found = Trained.load(file, device, task=task, branch=None, start=merge.base_fingerprint)
        self.fits.adopt(found, waited)
        theta0 = provided(merge.required_statistics & {"weights"}, trainer, learner.module, merge.base)
        given = {**found.statistics, **theta0}
        merge.commit(
            merge.task_vector(learner.module), learner.module, trainer, given=given, steps=found.steps, again=True
        )
        return trainer
