import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.tiny import tiny_clip

from support.records import without_times

from clmerge import ContinualClassifier, Learner
from clmerge.runs.branching import BranchedTask
from clmerge.callbacks import MergeCallback
from clmerge.merging import SLERP, Fisher, MagMax, WeightAverage, WiSEFT
from clmerge.models import CosineHead, LinearHead, OpenClip, ZeroShotHead
from clmerge.results.run_folder import RunFolder
from clmerge.streams import ClassIncremental, SklearnDigits, StreamDataModule
from clmerge.weights import TaskVectorBank, load_tensors

NAME = "backbone.model.visual.proj"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])


def make_learner(clip, mergers=None, *, head=None, num_tasks=2, **options):
    torch.manual_seed(0)
    module = ContinualClassifier(
        OpenClip(clip),
        head or ZeroShotHead(),
        loss_classes="current" if head else "all",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    )
    stream = ClassIncremental(SklearnDigits(), num_tasks=num_tasks)
    return Learner(stream, module, mergers or MagMax(), StreamDataModule(64), **options)


class Trace(Callback):
    """Remember start and end of every fit, and the images of its first epoch."""

    def __init__(self, fits):
        self.fits = fits

    def on_train_start(self, trainer, pl_module):
        self.fits.append({"start": pl_module.backbone.model.visual.proj.detach().clone(), "labels": []})

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 0:
            self.fits[-1]["labels"] += batch[1].tolist()

    def on_train_end(self, trainer, pl_module):
        self.fits[-1]["end"] = pl_module.backbone.model.visual.proj.detach().clone()


def traced(fits, **changes):
    def build(**given):
        given["callbacks"] = [*given["callbacks"], Trace(fits)]
        options = {"max_epochs": 1, "limit_val_batches": 1, **changes}
        return Trainer(accelerator="cpu", **options | given)

    return build


def test_branches_start_alike_train_on_their_own_part_and_are_averaged(clip, tmp_path):
    fits: list[dict] = []
    learner = make_learner(clip, start_policy="previous", branches=3)
    learner.fit(RunFolder.create(tmp_path / "run"), trainer=traced(fits))
    assert len(fits) == 2 * 3
    for task in (0, 1):
        branches = fits[3 * task : 3 * task + 3]
        assert all(torch.equal(fit["start"], branches[0]["start"]) for fit in branches)
        assert len({fit["end"].sum().item() for fit in branches}) == 3
        seen = sorted(label for fit in branches for label in fit["labels"])
        assert seen == sorted(learner.stream.dataset(task, "train").targets)
        sizes = [len(fit["labels"]) for fit in branches]
        assert max(sizes) - min(sizes) <= 1
    mean = torch.stack([fit["end"] for fit in fits[:3]]).mean(dim=0)
    torch.testing.assert_close(fits[3]["start"], mean, rtol=0, atol=1e-6)
    bank = TaskVectorBank(tmp_path / "run" / "bank")
    torch.testing.assert_close(bank[0][NAME], mean - learner.merge.base[NAME], rtol=0, atol=1e-6)
    assert learner.merge.num_tasks == 2


def test_rounds_go_on_from_the_merge_of_the_round_before(clip, tmp_path):
    fits: list[dict] = []
    learner = make_learner(clip, start_policy="base", branches=2, rounds=2, num_tasks=1)
    learner.fit(RunFolder.create(tmp_path / "run"), trainer=traced(fits))
    assert len(fits) == 4
    first = (fits[0]["end"] + fits[1]["end"]) / 2
    last = (fits[2]["end"] + fits[3]["end"]) / 2
    torch.testing.assert_close(fits[2]["start"], first, rtol=0, atol=1e-6)
    assert torch.equal(fits[2]["start"], fits[3]["start"])
    vector = TaskVectorBank(tmp_path / "run" / "bank")[0][NAME]
    torch.testing.assert_close(vector, last - learner.merge.base[NAME], rtol=0, atol=1e-6)
    counts = TaskVectorBank(tmp_path / "run" / "bank").metadata(0)
    steps = 2 * sum(-(-len(fit["labels"]) // 64) for fit in fits[:2])
    assert counts["steps"] == str(steps)


def test_branches_are_merged_as_vectors_from_their_start(clip):
    """SLERP of vectors from the start is not that of vectors from theta_0."""
    learner = make_learner(clip)
    module, merge = learner.module, learner.merge
    merge.take_base(module)
    with torch.no_grad():
        module.backbone.model.visual.proj.add_(1.0)  # an earlier task
    start = module.backbone.model.visual.proj.detach().clone()
    steps = [torch.randn(start.shape, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    task = BranchedTask(merge, module, SLERP(), branches=2, rounds=1, seed=0)
    for step in steps:
        task.begin()
        assert torch.equal(module.backbone.model.visual.proj, start)
        with torch.no_grad():
            module.backbone.model.visual.proj.add_(step)
        task.end()
    assert task.finished
    wanted = SLERP()
    for step in steps:
        wanted.update({NAME: (start + step) - start})
    torch.testing.assert_close(module.backbone.model.visual.proj - start, wanted.compute()[NAME], atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", [LinearHead, CosineHead])
def test_a_head_that_is_trained_is_averaged_over_the_branches(clip, tmp_path, head):
    heads: list[torch.Tensor] = []

    class Heads(Callback):
        def on_train_end(self, trainer, pl_module):
            heads.append(torch.cat([p.detach().flatten() for p in pl_module.head.parameters()]).clone())

    learner = make_learner(clip, head=head(), branches=2, num_tasks=1)
    learner.fit(
        RunFolder.create(tmp_path / "run"),
        trainer=lambda **given: Trainer(
            accelerator="cpu",
            max_epochs=1,
            limit_val_batches=1,
            **given | {"callbacks": [*given["callbacks"], Heads()]},
        ),
    )
    final = torch.cat([p.detach().flatten() for p in learner.module.head.parameters()])
    assert not torch.equal(heads[0], heads[1])
    torch.testing.assert_close(final, (heads[0] + heads[1]) / 2)


class KilledError(Exception):
    pass


@pytest.mark.parametrize(
    ("fit", "inside"),
    [(4, False), *(pytest.param(fit, True, marks=pytest.mark.exhaustive) for fit in (1, 6))],
)
def test_a_branched_run_resumes_to_the_same_bits(clip, tmp_path, fit, inside):
    class Kill(Callback):
        def on_train_start(self, trainer, pl_module):
            started.append(trainer)
            if len(started) == fit + 1 and not inside:
                raise KilledError

        def on_train_epoch_start(self, trainer, pl_module):
            if len(started) == fit + 1 and trainer.current_epoch == 1:
                raise KilledError

    def run(folder, *, kill):
        def build(**given):
            given["callbacks"] = [*given["callbacks"], *([Kill()] if kill else [])]
            return Trainer(accelerator="cpu", max_epochs=2, limit_val_batches=1, **given)

        learner = make_learner(clip, start_policy="previous", branches=2, rounds=2)
        opened = RunFolder.open(folder) if (folder / "manifest.json").is_file() else RunFolder.create(folder)
        return without_times(learner.fit(opened, trainer=build).to_dict())["models"]

    whole = run(tmp_path / "whole", kill=False)
    started: list[Trainer] = []
    with pytest.raises(KilledError):
        run(tmp_path / "killed", kill=True)
    assert run(tmp_path / "killed", kill=False) == whole
    weights = [load_tensors(tmp_path / name / "model" / "magmax.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    left = [path.name for path in (tmp_path / "killed").rglob("task_*branch*")]
    assert not left


def test_start_from_names_the_merger_whose_model_is_the_start(clip, tmp_path):
    fits: list[dict] = []
    mergers = [MagMax(), WiSEFT(alpha=0.25)]
    learner = make_learner(clip, mergers, start_policy="merged", start_from="wise_ft")
    learner.fit(RunFolder.create(tmp_path / "run"), trainer=traced(fits))
    base = learner.merge.base[NAME]
    torch.testing.assert_close(fits[1]["start"], base + 0.25 * (fits[0]["end"] - base), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"expected start_from to be one of \['magmax'\]"):
        MergeCallback(MagMax(), start_policy="merged", start_from="wise_ft")
    with pytest.raises(ValueError, match="under start_policy='merged', got 'magmax' under 'base'"):
        MergeCallback(MagMax(), start_policy="base", start_from="magmax")


def test_the_expert_can_be_deployed(clip, tmp_path):
    learner = make_learner(clip, WeightAverage(), deploy="expert", start_policy="merged")
    learner.fit(RunFolder.create(tmp_path / "run"), trainer=traced([]))
    assert learner.merge._evaluation_state(Trainer(logger=False, accelerator="cpu"), learner.module) is None
    saved = load_tensors(tmp_path / "run" / "model" / "expert.safetensors")
    assert torch.equal(saved["visual.proj"], learner.module.backbone.model.visual.proj)
    with pytest.raises(ValueError, match=r"expected deploy to be one of \['magmax', 'expert'\], got 'ties'"):
        MergeCallback(MagMax(), deploy="ties")


def test_what_branches_cannot_do_is_refused(clip):
    with pytest.raises(ValueError, match="1 branch or more and 1 round or more"):
        make_learner(clip, branches=0)
    with pytest.raises(ValueError, match="of several branches each, got 1 branches and 2 rounds"):
        make_learner(clip, rounds=2)
    with pytest.raises(ValueError, match="need task vectors alone"):
        make_learner(clip, branches=2, branch_merger=Fisher())
