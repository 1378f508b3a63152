"""Train the branches of a task, here or by jobs, and merge them in their order."""

import time
from typing import Any

from lightning.pytorch import Trainer

from clmerge.merging import Statistics
from clmerge.results.run_folder import RunFolder
from clmerge.runs.branching import BranchedTask, branch_label
from clmerge.runs.fits import Fits
from clmerge.runs.launching.branch_jobs import BranchJobs, RoundStart
from clmerge.runs.launching.trained import Trained
from clmerge.runs.learner_parts import LearnerParts
from clmerge.statistics.provided import provided
from clmerge.weights import TaskVector, fingerprint


class BranchTraining:
    """Train tasks in branches, commit each of them, and merge the result of the last round.

    Args:
        learner: The learner.
        run: The run folder.
        fits: Fits its model.
        jobs: Train the branches in place of this process, if there are any.
    """

    def __init__(self, learner: LearnerParts, run: RunFolder, fits: Fits, jobs: BranchJobs | None = None) -> None:
        self.learner = learner
        self.run = run
        self.fits = fits
        self.jobs = jobs
        self._sizes: dict[str, int] = {"branches": len(learner.participants(0, 0)), "rounds": learner.rounds}

    def train(self, task: int) -> Trainer:
        """Train a task, from the last committed branch on, and merge it; return the Trainer of its device.

        Args:
            task: Index of the task, which is the next one of the merge.
        """
        learner, run = self.learner, self.run
        trainer = self.fits.trainer(task)
        self.fits.begin(trainer, task)
        learner.module.to(trainer.strategy.root_device)  # if no branch is left to train, no Trainer moves it
        branched = self._branched(task)
        if run.manifest.branch:
            state = run.load_branch()
            branched.load_state_dict(state)
            self.fits.trajectory_bytes = int(state["trajectory"])
        begun = range(0)  # branches of the round that jobs train
        origin = ""
        while not branched.finished:
            branch = branched.done
            if self.jobs is None:
                trainer, statistics, _ = self._fit(branched, task)
            else:
                if branch not in begun:
                    begun = range(branch, (branch // branched.branches + 1) * branched.branches)
                    start = self._start(branched, task)
                    origin = start.fingerprint
                    self.jobs.begin_round(start, begun)
                statistics = self._adopt(self.jobs, task, branch, origin)
            self._set_place(task, branch)  # a score may look at the images of the branch
            branched.end(statistics)
            trainer.strategy.barrier("branch")
            state = branched.state_dict() | {"trajectory": self.fits.trajectory_bytes}
            run.commit_branch(self.fits.slot(task), branched.done, state)
        self._leave_place()
        given = provided(learner.merge.required_statistics, trainer, learner.module, learner.merge.base)
        learner.branch_steps = run.manifest.step - run.manifest.task_step
        learner.merge.commit(
            branched.vector(), learner.module, trainer, given=given, steps=learner.branch_steps, again=True
        )
        return trainer

    def train_apart(self, whole: RunFolder, task: int, branch: int) -> None:
        """Train one branch from the start of its round, and write down what the command needs to merge it.

        Args:
            whole: Folder of the run, which is not written.
            task: Index of the task.
            branch: Number of the task's fits before this one.
        """
        learner, merge, fits = self.learner, self.learner.merge, self.fits
        started = time.perf_counter()
        fits.only_task = fits.only_branch = True
        learner.data.task = task
        if task:
            learner.module.resume_tasks([one.classes for one in learner.tasks[:task]])
        trainer = fits.trainer(task)
        if merge.device == "model":
            learner.module.to(trainer.strategy.root_device)
        merge.take_base(learner.module)
        merge.next_task(learner.tasks[task].name, index=task)
        start = RoundStart.load(whole.round_start(task), task=task, base=merge.base_fingerprint)
        learner.module.load_state_dict(start.module)
        fits.begin(trainer, task)
        learner.module.load_state_dict(start.module)  # once more: what the command has begun counts
        learner.module.to(trainer.strategy.root_device)
        branched = self._branched(task)
        branched.enter(start.vector, start.rest, branch)
        trainer, statistics, steps = self._fit(branched, task)
        if self.run.writes:
            fits.hand_over(task, branch, start.fingerprint, statistics, steps=steps, started=started)
        trainer.strategy.barrier("trained")

    def _branched(self, task: int) -> BranchedTask:
        learner = self.learner
        return BranchedTask(
            learner.merge,
            learner.module,
            learner.branch_merger,
            seed=learner.seed,
            reference=learner.branch_reference,
            starts=self._starts(task),
            **self._sizes,
        )

    def _fit(self, branched: BranchedTask, task: int) -> tuple[Trainer, Statistics, int]:
        """Train the next branch; return its Trainer, what its merger requires, and its steps."""
        learner, branch, before = self.learner, branched.done, self.run.manifest.step
        trainer = self.fits.trainer(task, branch=branch, label=branch_label(branch, **self._sizes))
        branched.begin()
        learner.regularized.begin_branch()
        self._set_place(task, branch)
        self.fits.fit(trainer, task, branch=branch)
        learner.module.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
        steps = self.run.manifest.step - before
        return trainer, self._statistics(task, steps), steps

    def _adopt(self, jobs: BranchJobs, task: int, branch: int, start: str) -> Statistics:
        """Put what a job has trained into the model; return what the merger of branches requires."""
        learner, begun = self.learner, time.perf_counter()
        file = jobs.wait(branch)
        waited = time.perf_counter() - begun
        device = next(iter(learner.merge.base.values())).device
        found = Trained.load(file, device, task=task, branch=branch, start=start)
        self.fits.adopt(found, waited)
        return found.statistics

    def _start(self, branched: BranchedTask, task: int) -> RoundStart:
        vector, rest = branched.start
        base, module = self.learner.merge.base_fingerprint or "", self.learner.module.state_dict()
        return RoundStart(task, base, vector, fingerprint(vector), rest, module)

    def _set_place(self, task: int, branch: int) -> None:
        """Set images, optimizer settings and augmentation of a branch."""
        learner = self.learner
        turn, place = divmod(branch, self._sizes["branches"])
        client = learner.participants(task, turn)[place]
        split = learner.branch_images == "split"
        learner.data.part = (client, learner.branches) if split else (0, 1)
        learner.data.branch = 0 if split else branch
        learner.module.optimizer_settings = (learner.branch_settings or [{}] * learner.branches)[client]
        learner.data.augment(learner.branch_augmentations[client] if learner.branch_augmentations else None)

    def _leave_place(self) -> None:
        learner = self.learner
        learner.data.part, learner.data.branch, learner.module.optimizer_settings = (0, 1), 0, {}
        learner.data.augment(None)

    def _statistics(self, task: int, steps: int) -> Statistics:
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
