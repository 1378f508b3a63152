"""Train the tasks of a run: one fit or several branches of every task, the merge, and the commit of both."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from clmerge.callbacks import TrajectoryAverage
from clmerge.merging import Statistics
from clmerge.runs.branching import BranchedTask, branch_label
from clmerge.statistics.provided import provided
from clmerge.runs.launching.task_jobs import TaskJobs
from clmerge.runs.launching.trained_task import TrainedTask
from clmerge.runs.learner_parts import LearnerParts
from clmerge.results.results import Results
from clmerge.results.run_folder import RunFolder
from clmerge.streams.replay import replay_memory
from clmerge.streams.splits import derived_seed
from clmerge.runs.trainers import Trainers
from clmerge.weights import TaskVector


class TaskTraining:
    """Train one task after another of a learner's stream into a run folder.

    Args:
        learner: The learner with stream, module, data and merged models.
        run: The run folder.
        trainers: Builds the run's Trainers.
        jobs: Train the tasks in place of this process, if there are any.
    """

    def __init__(
        self, learner: LearnerParts, run: RunFolder, trainers: Trainers, jobs: TaskJobs | None = None
    ) -> None:
        self.learner = learner
        self.run = run
        self.trainers = trainers
        self.jobs = jobs
        self._slot: int | None = None  # by which the run folder of a job calls its only task

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
        self._next(task)
        trainer = self._obtain(results, task)
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
        if learner.learning:
            results.bytes["adaptation"] = learner.adaptation.nbytes(learner.data, range(task + 1))
        results.add_seconds("train", time.perf_counter() - started - learner.merge.seconds)
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
        learner = self.learner
        if self.jobs is not None:
            return self._adopt(results, task, self.jobs.wait(task))
        if learner.mergers and learner.branches > 1:
            return self._train_branches(task)
        if not learner.mergers:
            trainer = self._trainer(task)
            self._begin(trainer, task)
            if any(parameter.requires_grad for parameter in learner.module.parameters()):
                self._fit(trainer, task)
        else:
            trainer = self._trainer(task, callbacks=[learner.merge])
            self._begin(trainer, task)
            # Before a checkpoint is restored, whose weights are already trained: theta_0 is the weights before training.
            learner.merge.take_base(learner.module)
            self._fit(trainer, task)
        return trainer

    def train_apart(self, task: int) -> None:
        """Train a task, and write down what another process needs to merge it.

        Args:
            task: Index of the task.
        """
        learner, merge = self.learner, self.learner.merge
        started = time.perf_counter()
        self._slot = 0
        handed: list[tuple[Mapping[str, Any], int]] = []
        merge.hand_over = lambda statistics, steps: handed.append((statistics, steps))
        learner.data.task = task
        if task:
            learner.module.resume_tasks([one.classes for one in learner.tasks[:task]])
        self._next(task, index=task)
        if learner.branches == 1:
            trainer = self._trainer(task, callbacks=[merge])
            self._begin(trainer, task)
            merge.take_base(learner.module)
            self._fit(trainer, task)
        else:
            trainer = self._train_branches(task)
        if not handed:
            raise RuntimeError(f"expected a fit that trains task {task}, got none: set trainer.max_epochs to 1 or more")
        if self.run.writes:
            manifest, (statistics, steps) = self.run.manifest, handed[-1]
            weights = {name: tensor.detach().cpu() for name, tensor in learner.module.state_dict().items()}
            kept = {name: value for name, value in statistics.items() if name != "weights"}  # which are theta_0
            seconds = time.perf_counter() - started
            base = merge.base_fingerprint or ""
            done = TrainedTask(task, base, weights, kept, steps, manifest.step, manifest.epochs, seconds)
            done.save(self.run.path / "trained.pt")
        trainer.strategy.barrier("trained")

    def _adopt(self, results: Results, task: int, file: Path) -> Trainer:
        """Take over a task that a job has trained, and merge it."""
        learner, merge = self.learner, self.learner.merge
        trainer = self._trainer(task)
        self._begin(trainer, task)
        merge.take_base(learner.module)
        found = TrainedTask.load(file, next(iter(merge.base.values())).device)
        if (found.task, found.base) != (task, merge.base_fingerprint):
            raise ValueError(
                f"expected task {task}, trained from the base {str(merge.base_fingerprint)[:12]}, in {file}, got task "
                f"{found.task} from {found.base[:12]}: remove {file.parent}, and the task is trained again"
            )
        learner.module.load_state_dict(found.weights)
        theta0 = provided(merge.required_statistics & {"weights"}, trainer, learner.module, merge.base)
        given = {**found.statistics, **theta0}
        merge.commit(
            merge.task_vector(learner.module), learner.module, trainer, given=given, steps=found.steps, again=True
        )
        self.run.manifest.step += found.logged
        self.run.manifest.epochs += found.epochs
        results.add_seconds("train", found.seconds)
        return trainer

    def _next(self, task: int, index: int | None = None) -> None:
        """Tell the merge which task comes, and set the weights that it starts from."""
        merge, samples = self.learner.merge, len(self.learner.stream.dataset(task, "train"))
        merge.next_task(self.learner.tasks[task].name, samples=samples, index=index)
        merge.apply_start_policy(self.learner.module)

    def _slot_of(self, task: int) -> int:
        return task if self._slot is None else self._slot

    def _train_branches(self, task: int) -> Trainer:
        """Train a task in branches, commit each of them, and merge the result of the last round."""
        learner, run = self.learner, self.run
        per_round = len(learner.participants(task, 0))
        sizes: dict[str, int] = {"branches": per_round, "rounds": learner.rounds}
        done = run.manifest.branch
        trainer = self._trainer(task, branch=done, label=branch_label(done, **sizes))
        self._begin(trainer, task)
        learner.module.to(trainer.strategy.root_device)  # if no branch is left to train, no Trainer moves it
        branched = BranchedTask(
            learner.merge,
            learner.module,
            learner.branch_merger,
            seed=learner.seed,
            reference=learner.branch_reference,
            starts=self._starts(task),
            **sizes,
        )
        if done:
            branched.load_state_dict(run.load_branch())
        while not branched.finished:
            if branched.done > done:
                label = branch_label(branched.done, **sizes)
                trainer = self._trainer(task, branch=branched.done, label=label)
            branched.begin()
            turn, place = divmod(branched.done, per_round)
            branch, before = learner.participants(task, turn)[place], run.manifest.step
            split = learner.branch_images == "split"
            learner.data.part = (branch, learner.branches) if split else (0, 1)
            learner.data.branch = 0 if split else branched.done
            learner.module.optimizer_settings = (learner.branch_settings or [{}] * learner.branches)[branch]
            learner.data.augment(learner.branch_augmentations[branch] if learner.branch_augmentations else None)
            self._fit(trainer, task, branch=branched.done)
            branched.end(self._branch_statistics(task, run.manifest.step - before))
            trainer.strategy.barrier("branch")
            run.commit_branch(self._slot_of(task), branched.done, branched.state_dict())
        learner.data.part, learner.data.branch, learner.module.optimizer_settings = (0, 1), 0, {}
        learner.data.augment(None)
        given = provided(learner.merge.required_statistics, trainer, learner.module, learner.merge.base)
        learner.branch_steps = run.manifest.step - run.manifest.task_step
        learner.merge.commit(
            branched.vector(), learner.module, trainer, given=given, steps=learner.branch_steps, again=True
        )
        return trainer

    def _branch_statistics(self, task: int, steps: int) -> Statistics:
        """Return what the merger of branches requires of the branch that was just trained, and its images and steps."""
        learner = self.learner
        given: dict[str, Any] = {"samples": float(learner.data.num_train_images), "steps": float(steps)}
        if needed := learner.branch_merger.requires - given.keys():
            given |= learner.measure(needed, task, base=learner.merge.base, num_steps=steps)
        return given

    def _starts(self, task: int) -> list[TaskVector]:
        """Return the vectors at which the branches of a task's first round start, if not where the task does."""
        bank, learner = self.learner.merge.bank, self.learner
        if bank is None or learner.branch_starts == "task" or not task:
            return []
        latest = range(task - 1, max(task - 1 - learner.branches, -1), -1)
        return [{name: bank[one][name] for name in learner.merge.base} for one in latest]

    def _trainer(self, task: int, *, callbacks: Sequence[Callback] = (), branch: int = 0, label: str = "") -> Trainer:
        learner = self.learner
        if learner.trajectory is not None:
            average = TrajectoryAverage(learner.trajectory, score=lambda module: learner.score([task]))
            callbacks = [average, *callbacks]
        seed = derived_seed(learner.seed, "task", task, *([branch] if branch else []))
        return self.trainers.for_fit(
            f"task {task + 1}/{len(learner.tasks)} {learner.tasks[task].label}{label}",
            seed,
            self.run.checkpoint(self._slot_of(task), branch),
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
        self.trainers.fit(trainer, self.learner.module, self.learner.data, self.run.checkpoint(self._slot_of(task), branch))
