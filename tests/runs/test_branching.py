import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.records import without_times
from torchvision.transforms import v2

from clmerge import ContinualClassifier, Learner
from clmerge.callbacks import MergeCallback
from clmerge.merging import PAINT, SLERP, WIDEN, GreedySoup, MagMax, ModelStock, WeightAverage, WeightedAverage, WiSEFT
from clmerge.models import CosineHead, LinearHead, OpenClip, ZeroShotHead
from clmerge.results.run_folder import RunFolder
from clmerge.runs.branching import BranchedTask
from clmerge.streams import ClassIncremental, SklearnDigits, StreamDataModule
from clmerge.streams.augmentation import Augmentation
from clmerge.weights import TaskVectorBank, load_tensors

NAME = "backbone.model.visual.proj"


pytestmark = pytest.mark.usefixtures("no_pictures")


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
        task.end({"samples": 1.0, "steps": 1.0})
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


def test_branches_on_all_images_differ_by_order_and_augmentation(clip, tmp_path):
    fits: list[dict] = []
    learner = make_learner(clip, branches=2, branch_images="all", num_tasks=1)
    learner.fit(RunFolder.create(tmp_path / "run"), trainer=traced(fits))
    targets = list(learner.stream.dataset(0, "train").targets)
    assert sorted(fits[0]["labels"]) == sorted(fits[1]["labels"]) == sorted(targets)
    assert fits[0]["labels"] != fits[1]["labels"]
    plain: list[dict] = []
    make_learner(clip, num_tasks=1).fit(RunFolder.create(tmp_path / "plain"), trainer=traced(plain))
    assert fits[0]["labels"] == plain[0]["labels"]  # the first branch is the fit without branches
    assert torch.equal(fits[0]["end"], plain[0]["end"])


def test_vectors_from_the_base(clip, tmp_path):
    fits: list[dict] = []
    options = {"branches": 2, "rounds": 2, "branch_reference": "base", "branch_merger": ModelStock(), "num_tasks": 1}
    learner = make_learner(clip, **options)
    learner.fit(RunFolder.create(tmp_path / "run"), trainer=traced(fits))
    base = learner.merge.base[NAME]
    stock = ModelStock()
    for fit in fits[2:]:
        stock.update({NAME: fit["end"] - base})
    vector = TaskVectorBank(tmp_path / "run" / "bank")[0][NAME]
    torch.testing.assert_close(vector, stock.compute()[NAME], rtol=0, atol=1e-6)


def test_branches_that_start_at_earlier_experts(clip, tmp_path):
    fits: list[dict] = []
    learner = make_learner(clip, branches=2, start_policy="base", branch_starts="experts", num_tasks=3)
    learner.fit(RunFolder.create(tmp_path / "run"), trainer=traced(fits))
    bank, base = TaskVectorBank(tmp_path / "run" / "bank"), learner.merge.base[NAME]
    assert torch.equal(fits[0]["start"], fits[1]["start"])
    for fit in fits[2:4]:  # one earlier task: both start there
        torch.testing.assert_close(fit["start"], base + bank[0][NAME], rtol=0, atol=1e-6)
    torch.testing.assert_close(fits[4]["start"], base + bank[1][NAME], rtol=0, atol=1e-6)
    torch.testing.assert_close(fits[5]["start"], base + bank[0][NAME], rtol=0, atol=1e-6)
    mean = (fits[4]["end"] + fits[5]["end"]) / 2
    torch.testing.assert_close(base + bank[2][NAME], mean, rtol=0, atol=1e-6)


def test_settings_of_every_branch(clip, tmp_path):
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            [group] = trainer.optimizers[0].param_groups
            if batch_idx == 0:
                rates.append((group["lr"], group["weight_decay"]))

    settings = [{"lr": 1e-3}, {"lr": 2e-3, "weight_decay": 0.5}]
    learner = make_learner(clip, branches=2, branch_images="all", branch_settings=settings, num_tasks=1)

    def build(**given):
        given["callbacks"] = [*given["callbacks"], Rates()]
        return Trainer(accelerator="cpu", max_epochs=1, **given)

    learner.fit(RunFolder.create(tmp_path / "run"), trainer=build)
    assert rates == [(1e-3, 0.01), (2e-3, 0.5)]
    assert learner.module.optimizer_settings == {}
    assert learner.data.branch == 0
    learner = make_learner(clip, branches=2, branch_settings=[{"speed": 1.0}, {}], num_tasks=1)
    with pytest.raises(ValueError, match=r"a setting of AdamW, one of \[.*'lr'.*\], got 'speed'"):
        learner.fit(RunFolder.create(tmp_path / "wrong"), trainer=build)


def test_augmentation_of_every_branch(clip, tmp_path):
    class Images(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                seen.append(batch[0].clone())

    seen: list[torch.Tensor] = []
    dark = [[], [v2.ColorJitter(brightness=(0.0, 0.0))]]
    learner = make_learner(clip, branches=2, branch_images="all", branch_augmentations=dark, num_tasks=1)

    def build(**given):
        given["callbacks"] = [*given["callbacks"], Images()]
        return Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=1, limit_val_batches=1, **given)

    learner.fit(RunFolder.create(tmp_path / "run"), trainer=build)
    assert seen[0].std() > 0.1
    assert seen[1].amax() == seen[1].amin()  # all black
    assert not isinstance(learner.data._train_transform, Augmentation)  # the next task's first branch starts anew
    with pytest.raises(ValueError, match="branch_augmentations for each of the 2 branches, got 1"):
        make_learner(clip, branches=2, branch_augmentations=[[]])


@pytest.mark.parametrize("merger", [WeightedAverage(), GreedySoup(), PAINT()], ids=lambda merger: merger.name)
def test_branches_by_size_and_by_score(clip, tmp_path, merger):
    fits: list[dict] = []
    learner = make_learner(clip, branches=2, branch_merger=merger, num_tasks=1)
    scored: list[torch.Tensor] = []
    given = learner.merge.score

    def score(module):
        scored.append(module.backbone.model.visual.proj.detach().clone())
        return given(module)

    learner.merge.score = score
    learner.fit(RunFolder.create(tmp_path / "run"), trainer=traced(fits))
    result = learner.merge.base[NAME] + TaskVectorBank(tmp_path / "run" / "bank")[0][NAME]
    if merger.name == "weighted_average":
        sizes = torch.tensor([len(fit["labels"]) for fit in fits], dtype=torch.float64)
        assert sizes[0] != sizes[1]
        first, second = (fit["end"].double() for fit in fits)
        expected = (sizes[0] * first + sizes[1] * second) / sizes.sum()
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)
    else:  # what is scored is a model between the branches, not a vector from the start
        between = [(fits[0]["end"] - one).norm() + (fits[1]["end"] - one).norm() for one in scored if len(scored)]
        whole = (fits[0]["end"] - fits[1]["end"]).norm()
        assert min(float(one) for one in between) == pytest.approx(float(whole), rel=1e-4)


def test_what_branches_cannot_do_is_refused(clip):
    with pytest.raises(ValueError, match="branch_settings for each of the 2 branches, got 1"):
        make_learner(clip, branches=2, branch_settings=[{}])
    with pytest.raises(ValueError, match="keep_task_vectors=true with branch_starts"):
        make_learner(clip, branches=2, branch_starts="experts", keep_task_vectors=False)
    with pytest.raises(ValueError, match="1 branch or more and 1 round or more"):
        make_learner(clip, branches=0)
    with pytest.raises(ValueError, match="of several branches each, got 1 branches and 2 rounds"):
        make_learner(clip, rounds=2)
    with pytest.raises(ValueError, match=r"statistics of the branches' images, got one that needs \['weights'\]"):
        make_learner(clip, branches=2, branch_merger=WIDEN())
