"""The fits of a run: the Trainer of each, the start of a task, one fit, and what passes from a job to its command."""

import time
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from clmerge.callbacks import TrajectoryAverage
from clmerge.merging import Statistics
from clmerge.results.run_folder import RunFolder
from clmerge.runs.launching.trained import Trained
from clmerge.runs.learner_parts import LearnerParts
from clmerge.runs.trainers import Trainers
from clmerge.streams.splits import derived_seed


class Fits:
    """Fit the model of a learner, task after task.

    Args:
        learner: The learner.
        run: The run folder.
        trainers: Builds the run's Trainers.

    Attributes:
        only_task: Whether the run folder is that of a job, in which a task is the first and only one.
        only_branch: Whether it is that of a job which trains one branch.
        trajectory_bytes: Bytes that the average along the latest fit kept, 0 without one.
        elsewhere: Seconds that jobs trained, less those in which this process waited for them.
    """

    def __init__(self, learner: LearnerParts, run: RunFolder, trainers: Trainers) -> None:
        self.learner = learner
        self.run = run
        self.trainers = trainers
        self.only_task = False
        self.only_branch = False
        self.trajectory_bytes = 0
        self.elsewhere = 0.0

    def slot(self, task: int) -> int:
        """Return the number of a task in the run folder."""
        return 0 if self.only_task else task

    def next_task(self, task: int, index: int | None = None) -> None:
        """Tell the merge which task comes, and set the weights that it starts from."""
        merge, samples = self.learner.merge, len(self.learner.stream.dataset(task, "train"))
        merge.next_task(self.learner.tasks[task].name, samples=samples, index=index)
        merge.apply_start_policy(self.learner.module)

    def trainer(self, task: int, *, callbacks: Sequence[Callback] = (), branch: int = 0, label: str = "") -> Trainer:
        """Return the Trainer of a fit, and seed all global random generators.

        Args:
            task: Index of the task.
            callbacks: Callbacks placed before the learner's own.
            branch: Number of the task's fits before this one.
            label: What the progress display says after the name of the task.
        """
        learner = self.learner
        if learner.trajectory is not None:
            average = TrajectoryAverage(learner.trajectory, score=lambda module: learner.score([task]))
            callbacks = [average, *callbacks]
        seed = derived_seed(learner.seed, "task", task, *([branch] if branch else []))
        return self.trainers.for_fit(
            f"task {task + 1}/{len(learner.tasks)} {learner.tasks[task].label}{label}",
            seed,
            self._checkpoint(task, branch),
            callbacks,
            **({} if learner.epochs is None else {"max_epochs": learner.epochs[task]}),
            **({} if len(learner.stream.dataset(task, "val")) else {"limit_val_batches": 0}),
        )

    def begin(self, trainer: Trainer, task: int) -> None:
        """Prepare head and regularizers for a task, whose start policy has been applied."""
        learner, device = self.learner, trainer.strategy.root_device
        wants_means = learner.module.head.wants_prototypes
        if wants_means or learner.merge.device == "model":  # the Trainer has not moved the model yet
            learner.module.to(device)
        batches = learner.data.eval_dataloader("train", [task]) if wants_means else None
        learner.module.begin_task(learner.tasks[task].classes, batches)
        learner.regularized.begin(device)

    def fit(self, trainer: Trainer, task: int, *, branch: int = 0) -> None:
        """Fit, from the last epoch's checkpoint if there is one.

        Args:
            trainer: The Trainer that :meth:`trainer` returned.
            task: Index of the task.
            branch: Number of the task's fits before this one.
        """
        self.learner.module.epoch_offset = self.run.manifest.epochs
        self.trainers.fit(trainer, self.learner.module, self.learner.data, self._checkpoint(task, branch))
        if self.learner.trajectory is not None:
            self.trajectory_bytes = self.learner.trajectory.nbytes

    def hand_over(
        self, task: int, branch: int | None, start: str, statistics: Statistics, *, steps: int, started: float
    ) -> None:
        """Write down what this job has trained.

        Args:
            task: Index of the task.
            branch: Number of the task's fits before that of the job; None if it trained the whole task.
            start: Fingerprint of what it started from.
            statistics: What mergers require.
            steps: Optimizer steps.
            started: When the job started, in seconds.
        """
        manifest = self.run.manifest
        Trained(
            task=task,
            branch=branch,
            start=start,
            weights={name: tensor.detach().cpu() for name, tensor in self.learner.module.state_dict().items()},
            statistics=dict(statistics),
            steps=steps,
            logged=manifest.step,
            epochs=manifest.epochs,
            seconds=time.perf_counter() - started,
            trajectory=self.trajectory_bytes,
        ).save(self.run.path)

    def adopt(self, found: Trained, waited: float) -> None:
        """Put what a job has trained into the model, and count it.

        Args:
            found: What it handed over.
            waited: Seconds in which this process waited for it.
        """
        self.learner.module.load_state_dict(found.weights)
        self.run.manifest.step += found.logged
        self.run.manifest.epochs += found.epochs
        self.trajectory_bytes = found.trajectory
        self.elsewhere += found.seconds - waited

    def _checkpoint(self, task: int, branch: int) -> Path:
        return self.run.checkpoint(self.slot(task), 0 if self.only_branch else branch)
