"""Train the tasks of a run: one fit or several branches of every task, the merge, and the commit of both."""

import time
from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from clmerge.callbacks import TrajectoryAverage
from clmerge.runs.branching import BranchedTask, branch_label
from clmerge.statistics.provided import provided
from clmerge.runs.learner_parts import LearnerParts
from clmerge.results.results import Results
from clmerge.results.run_folder import RunFolder
from clmerge.streams.replay import replay_memory
from clmerge.streams.splits import derived_seed
from clmerge.runs.trainers import Trainers


class TaskTraining:
    """Train one task after another of a learner's stream into a run folder.

    Args:
        learner: The learner with stream, module, data and merged models.
        run: The run folder.
        trainers: Builds the run's Trainers.
    """

    def __init__(self, learner: LearnerParts, run: RunFolder, trainers: Trainers) -> None:
        self.learner = learner
        self.run = run
        self.trainers = trainers

    def train(self, results: Results, task: int) -> None:
        """Train a task, from its last checkpoint if there is one, merge it, and commit.

        Args:
            results: Receives the time and memory that training took.
            task: Index of the task.

        Raises:
            RuntimeError: If the fit ended without training.
        """
        learner, run = self.learner, self.run
        started = time.perf_counter()
        info = learner.tasks[task]
        learner.data.task = task
        learner.merge.apply_start_policy(learner.module)
        learner.merge.next_task(info.name, samples=len(learner.stream.dataset(task, "train")))
        if not learner.mergers:
            trainer = self._trainer(task)
            self._begin(trainer, task)
            if any(parameter.requires_grad for parameter in learner.module.parameters()):
                self._fit(trainer, task)
        elif learner.branches == 1:
            trainer = self._trainer(task, callbacks=[learner.merge])
            self._begin(trainer, task)
            # Before a checkpoint is restored, whose weights are already trained: theta_0 is the weights before training.
            learner.merge.take_base(learner.module)
            self._fit(trainer, task)
        else:
            trainer = self._train_branches(task)
        if learner.mergers and learner.merge.num_tasks != task + 1:
            raise RuntimeError(
                f"expected {task + 1} merged tasks after {info.name}, got {learner.merge.num_tasks}: the fit ended "
                "without training; set trainer.max_epochs to 1 or more"
            )
        results.bytes |= learner.regularized.end(trainer.strategy.root_device)
        if learner.trajectory is not None:
            results.bytes["trajectory"] = learner.trajectory.nbytes
        if learner.data.replay:
            memory = replay_memory(learner.stream, task + 1, learner.data.replay, None, seed=learner.data.seed)
            results.bytes["replay"] = memory.nbytes
        if any(merger.requires_gradient for merger in learner.mergers.values()):
            results.bytes["adaptation"] = learner.adaptation.nbytes(learner.data, range(task + 1))
        results.add_seconds("train", time.perf_counter() - started - learner.merge.seconds)
        results.add_seconds("merge", learner.merge.seconds)
        if learner.calibrated:
            device = trainer.strategy.root_device
            results.bytes |= learner.calibrated.collect(learner.merged(), task, device, expert=learner.expert)
        run.manifest.results = results.to_dict()
        trainer.strategy.barrier("trained")
        if learner.keep_task_vectors:
            run.keep_unmerged(task, learner.unmerged())
        accumulators = learner.merge.accumulators() | {"calibration": learner.calibrated.state_dict()}
        run.commit_state(task, learner.module.state_dict(), accumulators)

    def _train_branches(self, task: int) -> Trainer:
        """Train a task in branches, commit each of them, and merge the result of the last round."""
        learner, run = self.learner, self.run
        sizes: dict[str, int] = {"branches": learner.branches, "rounds": learner.rounds}
        done = run.manifest.branch
        trainer = self._trainer(task, branch=done, label=branch_label(done, **sizes))
        self._begin(trainer, task)
        learner.module.to(trainer.strategy.root_device)  # if no branch is left to train, no Trainer moves it
        branched = BranchedTask(learner.merge, learner.module, learner.branch_merger, seed=learner.seed, **sizes)
        if done:
            branched.load_state_dict(run.load_branch())
        while not branched.finished:
            if branched.done > done:
                label = branch_label(branched.done, **sizes)
                trainer = self._trainer(task, branch=branched.done, label=label)
            branched.begin()
            learner.data.part = (branched.done % learner.branches, learner.branches)
            self._fit(trainer, task, branch=branched.done)
            branched.end()
            trainer.strategy.barrier("branch")
            run.commit_branch(task, branched.done, branched.state_dict())
        learner.data.part = (0, 1)
        given = provided(learner.merge.required_statistics, trainer, learner.module, learner.merge.base)
        learner.branch_steps = run.manifest.step - run.manifest.task_step
        learner.merge.commit(
            branched.vector(), learner.module, trainer, given=given, steps=learner.branch_steps, again=True
        )
        return trainer

    def _trainer(self, task: int, *, callbacks: Sequence[Callback] = (), branch: int = 0, label: str = "") -> Trainer:
        learner = self.learner
        if learner.trajectory is not None:
            callbacks = [TrajectoryAverage(learner.trajectory), *callbacks]
        seed = derived_seed(learner.seed, "task", task, *([branch] if branch else []))
        return self.trainers.for_fit(
            f"task {task + 1}/{len(learner.tasks)} {learner.tasks[task].label}{label}",
            seed,
            self.run.checkpoint(task, branch),
            callbacks,
            **({} if learner.epochs is None else {"max_epochs": learner.epochs[task]}),
            **({} if len(learner.stream.dataset(task, "val")) else {"limit_val_batches": 0}),
        )

    def _begin(self, trainer: Trainer, task: int) -> None:
        learner, device = self.learner, trainer.strategy.root_device
        wants_means = learner.module.head.wants_prototypes
        if wants_means or learner.merge.device == "model":  # the Trainer has not moved the model yet
            learner.module.to(device)
        batches = learner.data.eval_dataloader("train", [task]) if wants_means else None
        learner.module.begin_task(learner.tasks[task].classes, batches)
        learner.regularized.begin(device)

    def _fit(self, trainer: Trainer, task: int, *, branch: int = 0) -> None:
        self.learner.module.epoch_offset = self.run.manifest.epochs
        self.trainers.fit(trainer, self.learner.module, self.learner.data, self.run.checkpoint(task, branch))
