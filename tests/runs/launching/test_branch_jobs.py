"""Branches that jobs train have the bits of one process, whatever the model and the merger; the jobs run here."""

import pytest
import torch
from lightning.pytorch import Trainer
from support.records import without_times
from support.tiny import tiny_clip
from support.toy_backbone import Normed

from clmerge import ContinualClassifier, Learner
from clmerge.merging import PAINT, SLERP, Fisher, MagMax, WeightAverage
from clmerge.models import CosineHead, Frozen, LinearHead, LoRA, OpenClip
from clmerge.results.run_folder import RunFolder
from clmerge.runs.branching import BranchedTask
from clmerge.runs.launching import Job, Launcher
from clmerge.runs.launching.branch_jobs import BranchJobs, RoundStart
from clmerge.runs.launching.spread import spread_of
from clmerge.runs.launching.trained import FILE, Trained
from clmerge.streams import ClassIncremental, SklearnDigits, StreamDataModule
from clmerge.training.regularizers import EWC, MeanTeacher
from clmerge.training.trajectory import EMA
from clmerge.weights import load_tensors

pytestmark = pytest.mark.usefixtures("no_pictures")


def make(backbone, head=None, *, data=None, regularizers=(), tuning=None, mergers=None, **options):
    torch.manual_seed(0)
    module = ContinualClassifier(
        backbone,
        head,
        tuning=tuning,
        loss_classes="seen" if head or data else "all",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        regularizers=regularizers,
    )
    stream = ClassIncremental(SklearnDigits(), num_tasks=2, val_fraction=0.1)
    given = {"branches": 2, "rounds": 2, "statistics_images": 16, **options}
    return Learner(stream, module, mergers or MagMax(), StreamDataModule(32, **data or {}), **given)


def normed():
    torch.manual_seed(0)
    return Normed()


class Fits:
    """Builds Trainers of two steps, and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, **given):
        self.count += given["enable_checkpointing"]
        return Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=2, limit_val_batches=1, **given)


class Here(Launcher):
    """Runs jobs in this process, each with a learner of its own; stops with an error after some of them."""

    def __init__(self, build, run, until=99):
        super().__init__(jobs=1)
        self.build, self.folder, self.left = build, run, until
        self.done = []

    def run(self, jobs):
        for job in reversed(jobs):  # in another order than they are merged
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            task, branch = (int(word) for word in job.command)
            whole = RunFolder(self.folder, writes=False)
            self.build().train_apart(
                RunFolder.create(whole.job(task, branch)), task, branch=branch, whole=whole, trainer=Fits()
            )
            self.done.append((task, branch))
            yield job, 0


def jobs_of(run, launcher):
    def job(task, branch):
        folder = run.job(task, branch)
        words = (str(task), str(branch))
        return Job(f"{task} {branch}", words, log=f"{folder}.log", commit=str(folder / FILE), folder=str(run.path))

    return BranchJobs(run, launcher, job)


CASES = {
    "merged vectors": lambda clip: make(OpenClip(clip), branch_merger=SLERP(), rounds=1, branches=3),
    "clients": lambda clip: make(
        OpenClip(clip), branch_merger=Fisher(), branches=4, branch_fraction=0.5, data={"dirichlet": 0.5}
    ),
    "running statistics and a head": lambda clip: make(normed(), LinearHead()),
    "class means and scores": lambda clip: make(
        normed(), CosineHead(), branch_merger=PAINT(), branches=3, buffers="re-estimated"
    ),
    "factors": lambda clip: make(OpenClip(clip), tuning=LoRA(), start_policy="merged"),
    "what a fit changes beside": lambda clip: make(
        OpenClip(clip), regularizers=[MeanTeacher(), EWC()], trajectory=EMA(0.5), data={"replay": 20}
    ),
    "own settings and starts": lambda clip: make(
        OpenClip(clip),
        start_policy="base",
        branch_starts="experts",
        branch_images="all",
        branch_reference="base",
        branch_settings=[{"lr": 1e-3}, {"lr": 2e-3}],
        branch_augmentations=[[], []],
        mergers=Fisher(),
    ),
}


def outcome(results, run):
    found = without_times(results.to_dict())
    files = [*run.rglob("bank/*.safetensors"), *run.rglob("model/*.safetensors"), *run.rglob("state/*/*.safetensors")]
    return found["models"], found["bytes"], {file.relative_to(run): load_tensors(file) for file in files}


def assert_same(one, other):
    assert one[:2] == other[:2]
    assert one[2].keys() == other[2].keys()
    for file, tensors in one[2].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other[2][file][name]), (file, name)


@pytest.mark.parametrize("case", CASES)
def test_jobs_give_the_bits_of_one_process(clip, tmp_path, case):
    build = lambda: CASES[case](clip)  # noqa: E731
    alone = build().fit(RunFolder.create(tmp_path / "alone"), trainer=Fits())
    run = RunFolder.create(tmp_path / "jobs")
    learner, fits, launcher = build(), Fits(), Here(build, run.path)
    assert spread_of(learner) == "branches"
    spread = learner.fit(run, trainer=fits, jobs=jobs_of(run, launcher))
    assert_same(outcome(spread, run.path), outcome(alone, tmp_path / "alone"))
    taking_part = len(learner.participants(0, 0))
    numbers = [
        (task, turn * taking_part + place)
        for task in (0, 1)
        for turn in range(learner.rounds)
        for place in reversed(range(taking_part))
    ]
    assert launcher.done == numbers
    assert not [*run.path.glob("jobs/*")]
    assert not [*run.path.glob("state/*branch*")]


@pytest.mark.parametrize("goes_on", ["by jobs", "alone"])
@pytest.mark.parametrize("until", [1, 2, 5])
def test_a_command_that_ends_is_taken_up_and_trains_nothing_twice(clip, tmp_path, until, goes_on):
    build = lambda: CASES["running statistics and a head"](clip)  # noqa: E731
    alone = build().fit(RunFolder.create(tmp_path / "alone"), trainer=Fits())
    run = RunFolder.create(tmp_path / "jobs")
    first = Here(build, run.path, until)
    with pytest.raises(KeyboardInterrupt):
        build().fit(run, trainer=Fits(), jobs=jobs_of(run, first))
    merged = run.manifest.trained * 4 + run.manifest.branch
    assert merged == {1: 0, 2: 2, 5: 4}[until]  # of the last round the second branch is trained, not the first
    again = RunFolder.open(run.path)
    second = Here(build, run.path)
    jobs = jobs_of(again, second) if goes_on == "by jobs" else None
    spread = build().fit(again, trainer=Fits(), jobs=jobs)
    assert_same(outcome(spread, run.path), outcome(alone, tmp_path / "alone"))
    if jobs is not None:
        assert len(first.done) + len(second.done) == 8
        assert not {*first.done} & {*second.done}
    assert not [*run.path.glob("jobs/*")]


def test_jobs_for_branches_need_branches(clip, tmp_path):
    run, build = RunFolder.create(tmp_path / "run"), lambda: make(OpenClip(clip), branches=1, rounds=1)
    with pytest.raises(ValueError, match=r"learner.branches of 2 or more, for jobs that train branches, got 1 and \["):
        build().fit(run, trainer=Fits(), jobs=jobs_of(run, Here(build, run.path)))


def test_what_a_job_hands_over_is_that_of_its_branch_and_start(tmp_path):
    found = Trained(1, 2, "abc", {}, {}, steps=1, logged=1, epochs=1, seconds=1.0, trajectory=0)
    found.save(tmp_path)
    cpu, file = torch.device("cpu"), tmp_path / FILE
    assert Trained.load(file, cpu, task=1, branch=2, start="abc") == found
    with pytest.raises(
        ValueError, match=r"expected task 1, branch 3, trained from abc, in .*, got task 1, branch 2 from"
    ):
        Trained.load(file, cpu, task=1, branch=3, start="abc")
    with pytest.raises(ValueError, match=r"expected task 1, branch 2, trained from other, in .* from abc: remove "):
        Trained.load(file, cpu, task=1, branch=2, start="other")


def test_a_job_with_another_checkpoint_of_the_backbone_is_refused(clip, tmp_path):
    build = lambda: make(OpenClip(clip))  # noqa: E731
    run = RunFolder.create(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        build().fit(run, trainer=Fits(), jobs=jobs_of(run, Here(build, run.path, 0)))
    other = make(OpenClip(tiny_clip(tmp_path / "clip", seed=1)))
    with pytest.raises(ValueError, match="all machines need the same checkpoint of the backbone"):
        other.train_apart(RunFolder.create(tmp_path / "job"), 0, branch=0, whole=run, trainer=Fits())
    with pytest.raises(ValueError, match="expected a round of task 1 from the base"):
        RoundStart.load(run.round_start(0), task=1, base="abc")


def test_running_statistics_of_branches_start_alike_and_are_averaged():
    learner = make(normed(), LinearHead(), rounds=1)
    learner.module.begin_stream(10)
    learner.module.begin_task([0, 1])
    norm = learner.module.backbone.model[2]
    task = BranchedTask(learner.merge, learner.module, WeightAverage(), branches=2, rounds=1, seed=0)
    for mean, count in ((1.0, 2), (4.0, 5)):
        task.begin()
        assert norm.running_mean.eq(0).all()
        assert norm.num_batches_tracked == 0
        norm.running_mean.fill_(mean)
        norm.num_batches_tracked.fill_(count)
        task.end({"samples": 1.0, "steps": 1.0})
    assert norm.running_mean.eq(2.5).all()
    assert norm.num_batches_tracked == 3


@pytest.mark.parametrize(
    ("options", "spread"),
    [
        ({"start_policy": "base", "branches": 2}, "tasks"),
        ({"start_policy": "base", "branches": 2, "branch_starts": "experts"}, "branches"),
        ({"start_policy": "base", "branches": 2, "data": {"replay": 5}}, "branches"),
        ({"start_policy": "previous", "branches": 2}, "branches"),
        ({"start_policy": "base", "branches": 1, "rounds": 1}, "tasks"),
    ],
)
def test_tasks_are_spread_where_they_do_not_depend_on_each_other_else_branches(clip, options, spread):
    assert spread_of(make(OpenClip(clip), **options)) == spread


def test_neither_is_refused(clip):
    with pytest.raises(ValueError, match=r"start_policy=base, got 'previous'.*learner.branches of one task after"):
        spread_of(make(OpenClip(clip), branches=1, rounds=1))
    with pytest.raises(ValueError, match=r"expected weights to merge, got a frozen backbone"):
        spread_of(make(OpenClip(clip), tuning=Frozen(), start_policy="base"))
