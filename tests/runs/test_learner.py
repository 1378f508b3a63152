import json
import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.records import without_times
from torch.nn import functional

from clmerge import ContinualClassifier, Learner
from clmerge.evaluation.evaluate import accuracy_on
from clmerge.figures import save_plots
from clmerge.merging import (
    EMR,
    PAINT,
    TALL,
    TIES,
    FedNova,
    Fisher,
    FisherMaskNodes,
    GreedySoup,
    GroupScale,
    MagMax,
    MaTS,
    Pipeline,
    RegMean,
    Scale,
    TaskArithmetic,
    WeightAverage,
    WeightedAverage,
)
from clmerge.models import CosineHead, Frozen, LinearHead, OpenClip, Timm, ZeroShotHead
from clmerge.results.results import Results
from clmerge.results.run_folder import RunFolder
from clmerge.results.table import render_text
from clmerge.streams import ClassIncremental, SklearnDigits, StreamDataModule
from clmerge.weights import TaskVectorBank, load_tensors

pytestmark = pytest.mark.usefixtures("no_pictures")


def make_learner(
    clip,
    mergers,
    *,
    head=None,
    loss="current",
    backbone=None,
    num_tasks=3,
    val_fraction=0.1,
    data=None,
    tuning=None,
    **options,
):
    torch.manual_seed(0)
    module = ContinualClassifier(
        backbone or OpenClip(clip),
        head or ZeroShotHead(),
        tuning=tuning,
        loss_classes=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    )
    stream = ClassIncremental(SklearnDigits(), num_tasks=num_tasks, val_fraction=val_fraction)
    return Learner(stream, module, mergers, data or StreamDataModule(64), **options)


def build_trainer(**given):
    options = {"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 1} | given
    return Trainer(accelerator="cpu", **options)


def run(learner, folder, **options):
    return learner.fit(RunFolder.create(folder), trainer=build_trainer, **options)


def test_expert_and_mergers_are_what_they_say(clip, tmp_path):
    """The row of every model is that of its weights: checked with the weights the run leaves behind."""
    learner = make_learner(clip, [MagMax(), TaskArithmetic(scale=1.0)], start_policy="previous", loss="all")
    results = run(learner, tmp_path / "run")
    base, merged = learner.merge.base, learner.merge.merged_state("task_arithmetic")
    bank = TaskVectorBank(tmp_path / "run" / "bank")
    for name, value in merged.items():
        torch.testing.assert_close(value, base[name] + sum(tau[name] for tau in bank))

    images = learner.data.eval_dataloader("test")
    learner.module.eval()
    for model in ("magmax", "expert"):
        correct, total = torch.zeros(3), torch.zeros(3)
        saved = load_tensors(tmp_path / "run" / "model" / "magmax.safetensors") if model == "magmax" else None
        if saved:
            learner.module.backbone.model.load_state_dict(saved)
        else:
            state, _ = RunFolder.open(tmp_path / "run").load_state()
            learner.module.load_state_dict(state)
        with torch.no_grad():
            for x, y, tasks in images:
                hit = learner.module(x).argmax(dim=1) == y
                correct.index_add_(0, tasks, hit.float())
                total.index_add_(0, tasks, torch.ones(len(y)))
        assert results.matrix(model)[-1].tolist() == pytest.approx((correct / total).tolist(), abs=1e-6)


def test_models_are_evaluated_as_often_and_on_as_much_as_wanted(clip, tmp_path, capsys):
    whole = run(make_learner(clip, [MagMax()], loss="all"), tmp_path / "whole")
    shown = []
    some = make_learner(clip, [MagMax()], loss="all", evaluate_every=2)
    found = run(some, tmp_path / "some", report=lambda results: shown.append(results.num_finished))
    assert shown == [2, 3]
    for model in ("magmax", "expert"):
        R, expected = (results.matrix(model).tolist() for results in (found, whole))
        assert all(math.isnan(value) for value in R[0])
        assert R[1:] == expected[1:]
        assert found.figures(model)["average_accuracy"][1:] == whole.figures(model)["average_accuracy"][1:]
        assert math.isnan(found.figures(model)["forgetting"])
    assert found.model("magmax").bytes_kept == whole.model("magmax").bytes_kept
    assert found.model("magmax").merge_seconds[0] is None

    seen = run(make_learner(clip, [MagMax()], loss="all", evaluate_on="seen"), tmp_path / "seen")
    R, expected = (results.matrix("magmax", "task_aware") for results in (seen, whole))
    assert torch.equal(torch.tensor(R).isnan(), torch.ones(3, 3).triu(1).bool())
    assert R[R == R].tolist() == expected[R == R].tolist()
    assert seen.figures("magmax")["forgetting"] == whole.figures("magmax")["forgetting"]
    assert math.isnan(seen.figures("magmax")["forward_transfer"])
    assert seen.matrix("zero_shot").tolist() == whole.matrix("zero_shot").tolist()
    assert "task 2/3: " in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"expected learner\.evaluate_every of 1 or more, got 0"):
        make_learner(clip, [MagMax()], evaluate_every=0)


def test_a_run_that_skips_evaluations_resumes(clip, tmp_path):
    fits = []

    class Stop(Callback):
        def on_train_start(self, trainer, module):
            fits.append(trainer)
            if len(fits) == 3:
                raise KeyboardInterrupt

    def make():
        return make_learner(clip, [MagMax()], loss="all", evaluate_every=3)

    whole = run(make(), tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make().fit(
            RunFolder.create(tmp_path / "run"),
            trainer=lambda **given: build_trainer(**given | {"callbacks": [*given["callbacks"], Stop()]}),
        )
    opened = RunFolder.open(tmp_path / "run")
    assert opened.manifest.evaluated == 2
    resumed = make().fit(opened, trainer=build_trainer)
    assert without_times(resumed.to_dict()) == without_times(whole.to_dict())


@pytest.mark.parametrize("merger", [EMR(), TALL(), Pipeline(TALL(), finisher=Scale(0.5))], ids=repr)
def test_rules_with_a_view_per_task_are_evaluated_with_their_views(clip, tmp_path, merger):
    learner = make_learner(clip, [merger, MagMax()], head=LinearHead(), loss="seen", num_tasks=2, val_fraction=0)
    results = run(learner, tmp_path / "run")
    name = merger.name
    images = learner.data.eval_dataloader("test")
    row = []
    for task in learner.tasks:
        view = learner.merge.state_with(learner.merge.mergers[name].task_view(task.index), learner.module, merger=name)
        learner.module.load_state_dict(view, strict=False)
        row.append(accuracy_on(learner.module, _only(images, task.index), [t.classes for t in learner.tasks]))
    found = results.matrix(name, "task_aware").tolist()
    assert found[1] == pytest.approx(row)
    assert math.isnan(found[0][1]), "the second task had no view yet"
    assert not math.isnan(found[0][0])
    document = results.to_dict()
    assert document["models"][name]["task_agnostic"] is None
    assert results.best_merger() == "magmax"
    assert f"{name}: must be told the task of every image" in render_text(results)
    assert Results.from_dict(json.loads(json.dumps(document))).to_dict() == document
    save_plots(results, tmp_path / "plots")


def _only(images, task):
    """The batches' images of one task."""
    for x, y, tasks in images:
        chosen = tasks == task
        if chosen.any():
            yield x[chosen], y[chosen], tasks[chosen]


def test_zero_shot_is_the_model_before_the_first_task(clip, tmp_path):
    learner = make_learner(clip, MagMax())
    untouched = make_learner(clip, MagMax())
    results = run(learner, tmp_path / "run")
    untouched.data.setup_stream(untouched.stream, None, untouched.module.backbone.eval_transform)
    untouched.module.begin_stream(10, untouched.stream.class_prompts)
    untouched.module.eval()
    hits = [(untouched.module(x).argmax(1) == y)[t == 0] for x, y, t in untouched.data.eval_dataloader("test")]
    assert results.matrix("zero_shot")[0][0] == pytest.approx(float(torch.cat(hits).float().mean()))


@pytest.mark.parametrize("policy", ["base", "previous", "merged"])
def test_every_task_starts_where_the_policy_says(clip, tmp_path, policy):
    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            starts.append(pl_module.backbone.model.visual.proj.detach().clone())

    starts, name = [], "backbone.model.visual.proj"
    learner = make_learner(clip, WeightAverage(), start_policy=policy, num_tasks=2)
    learner.fit(
        RunFolder.create(tmp_path / "run"),
        trainer=lambda **given: build_trainer(**given | {"callbacks": [*given["callbacks"], Start()]}),
    )
    base, bank = learner.merge.base[name], TaskVectorBank(tmp_path / "run" / "bank")
    expected = base if policy == "base" else base + bank[0][name]  # of one task, the average is its vector
    assert torch.equal(starts[0], base)
    torch.testing.assert_close(starts[1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head", [LinearHead, CosineHead])
@pytest.mark.parametrize("loss", ["current", "seen"])
def test_growing_heads_have_no_accuracy_on_tasks_to_come(clip, tmp_path, head, loss):
    learner = make_learner(clip, MagMax(), head=head(), loss=loss)
    results = run(learner, tmp_path / "run").to_dict()
    for model in ("magmax", "expert"):
        matrix = results["models"][model]["task_agnostic"]["R"]
        assert [[value is None for value in row] for row in matrix] == [
            [False, True, True],
            [False, False, True],
            [False, False, False],
        ]
    assert "zero_shot" not in results["models"]
    assert results["models"]["magmax"]["task_agnostic"]["forward_transfer"] is None
    assert (tmp_path / "run" / "model" / "head.safetensors").is_file()


def test_timm_backbone_runs_the_stream(tmp_path):
    backbone = Timm("test_vit", image_size=32)
    learner = make_learner(None, [MagMax(), TIES()], head=CosineHead(), backbone=backbone, num_tasks=2)
    results = run(learner, tmp_path / "run")
    assert results.num_finished == 2
    saved = load_tensors(tmp_path / "run" / "model" / "ties.safetensors")
    backbone.model.load_state_dict(saved, strict=True)


def test_mergers_that_need_a_score_get_one_from_validation_images(clip, tmp_path):
    learner = make_learner(clip, [PAINT(), GreedySoup()], start_policy="merged", num_tasks=2)
    results = run(learner, tmp_path / "run")
    assert set(results.mergers) == {"paint", "greedy_soup"}
    with pytest.raises(ValueError, match=r"set stream\.val_fraction above 0"):
        make_learner(clip, GreedySoup(), val_fraction=0.0)


def test_epochs_may_differ_by_task(clip, tmp_path):
    class Count(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            counts[pl_module._task_classes[0]] = trainer.current_epoch + 1

    counts = {}
    learner = make_learner(clip, MagMax(), epochs=[1, 3, 2])
    learner.fit(
        RunFolder.create(tmp_path / "run"),
        trainer=lambda **given: build_trainer(**given | {"callbacks": [*given["callbacks"], Count()]}),
    )
    assert list(counts.values()) == [1, 3, 2]


def test_two_mergers_of_one_class_have_their_own_rows(clip, tmp_path):
    learner = make_learner(clip, [TIES(density=0.1), TIES(density=0.9)], num_tasks=2)
    results = run(learner, tmp_path / "run")
    assert len(results.mergers) == 2
    assert {path.stem for path in (tmp_path / "run" / "model").glob("*.safetensors")} == set(results.mergers)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(clip, tmp_path):
    states = []
    for i, seed in enumerate((0, 0, 1)):
        learner = make_learner(clip, MagMax(), seed=seed, num_tasks=2)
        learner.data.seed = seed
        run(learner, tmp_path / str(i))
        states.append(learner.merge.merged_state())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_a_fit_without_training_is_an_error_that_says_so(clip, tmp_path):
    learner = make_learner(clip, MagMax(), num_tasks=2)
    with (
        pytest.warns(RuntimeWarning, match="trained nothing"),
        pytest.raises(RuntimeError, match=r"trainer.max_epochs to 1 or more"),
    ):
        learner.fit(
            RunFolder.create(tmp_path / "run"), trainer=lambda **given: build_trainer(**given | {"max_epochs": 0})
        )


def test_a_run_resumes_only_on_its_own_stream(clip, tmp_path):
    run(make_learner(clip, MagMax(), num_tasks=2), tmp_path / "run")
    other = make_learner(clip, MagMax(), num_tasks=5)
    with pytest.raises(ValueError, match="expected the stream of"):
        other.fit(RunFolder.open(tmp_path / "run"), trainer=build_trainer)


def test_the_report_sees_every_task(clip, tmp_path):
    seen = []
    run(make_learner(clip, MagMax(), num_tasks=2), tmp_path / "run", report=lambda r: seen.append(r.num_finished))
    assert seen == [1, 2]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["trained"], manifest["evaluated"], manifest["finished"]) == (2, 2, True)


def test_a_stream_of_one_task_has_matrices_of_one_number(clip, tmp_path):
    results = run(make_learner(clip, MagMax(), num_tasks=1), tmp_path / "run")
    assert results.matrix("magmax").shape == (1, 1)
    assert results.to_dict()["models"]["magmax"]["task_agnostic"]["forgetting"] is None


@pytest.mark.parametrize("head", [ZeroShotHead, LinearHead])
def test_mergers_that_need_statistics_get_them_from_the_task(clip, tmp_path, head):
    mergers = [Fisher(), FisherMaskNodes(), RegMean(), FedNova(), WeightedAverage(by="loss"), MaTS(2, outputs=True)]
    learner = make_learner(clip, mergers, head=head(), num_tasks=2, statistics_images=8)
    results = run(learner, tmp_path / "run")
    assert set(results.mergers) == {"fisher", "fisher_mask_nodes", "regmean", "fednova", "weighted_average", "mats"}
    merged = {name: learner.merge.merged_state(name) for name in results.mergers}
    mean = WeightAverage()
    for tau in TaskVectorBank(tmp_path / "run" / "bank"):
        mean.update(tau)
    key = "backbone.model.visual.transformer.resblocks.0.mlp.c_fc.weight"
    plain = learner.merge.base[key] + mean.compute()[key]
    assert all(not torch.equal(state[key], plain) for state in merged.values())


def test_replayed_classes_must_be_in_the_loss(clip):
    with pytest.raises(ValueError, match=r"loss_classes 'seen' or 'all' with data\.replay=10, got 'current'"):
        make_learner(clip, MagMax(), data=StreamDataModule(64, replay=10))


@pytest.mark.exhaustive
def test_replay_keeps_more_of_earlier_tasks_than_sequential_fine_tuning(clip, tmp_path):
    def last(name, **data):
        learner = make_learner(clip, MagMax(), loss="all", num_tasks=2, data=StreamDataModule(32, **data))
        results = learner.fit(
            RunFolder.create(tmp_path / name),
            trainer=lambda **given: build_trainer(**{"max_epochs": 4, "limit_train_batches": 1.0} | given),
        )
        wanted = {"replay": 10 * 4 * 3 * 8 * 8} if data.get("replay") == 40 else {}
        assert results.bytes | wanted == results.bytes
        return results.matrix("expert")[1]

    sequential, replayed, joint = last("sequential"), last("replay", replay=40), last("joint", replay="all")
    assert replayed[0] > sequential[0] + 0.2
    assert joint[0] > sequential[0] + 0.2


def test_a_frozen_backbone_with_class_means_is_a_baseline_without_training(clip, tmp_path):
    """SimpleCIL: the nearest class mean, here computed anew; every task's images are seen once."""
    learner = make_learner(clip, MagMax(), head=CosineHead(trainable=False), tuning=Frozen(), num_tasks=2)
    results = run(learner, tmp_path / "run").to_dict()
    assert list(results["models"]) == ["expert"]
    assert not list((tmp_path / "run").glob("bank/*"))
    backbone = OpenClip(clip).eval()
    stream, transform = learner.stream, backbone.eval_transform
    with torch.no_grad():
        features, labels = {}, {}
        for split in ("train", "test"):
            found = [item for task in (0, 1) for item in stream.dataset(task, split, transform)]
            features[split] = functional.normalize(backbone(torch.stack([image for image, _ in found])), dim=1)
            labels[split] = torch.tensor([label for _, label in found])
    means = torch.stack([features["train"][labels["train"] == c].mean(dim=0) for c in range(10)])
    hits = (features["test"] @ functional.normalize(means, dim=1).T).argmax(dim=1) == labels["test"]
    first = len(stream.dataset(0, "test"))
    wanted = [hits[:first].float().mean().item(), hits[first:].float().mean().item()]
    assert results["models"]["expert"]["task_agnostic"]["R"][1] == pytest.approx(wanted, abs=5e-3)


def test_a_head_alone_can_be_trained(clip, tmp_path):
    learner = make_learner(clip, MagMax(), head=LinearHead(), tuning=Frozen(), loss="seen", num_tasks=2)
    before = {name: value.clone() for name, value in learner.module.backbone.state_dict().items()}
    results = run(learner, tmp_path / "run")
    assert results.models == ["expert"]
    assert all(torch.equal(before[name], value) for name, value in learner.module.backbone.state_dict().items())
    assert (tmp_path / "run" / "model" / "head.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mergers": [TaskArithmetic(weights=[1.0, 2.0])]},
            "'task_arithmetic': expected one entry for each of the 3 tasks",
        ),
        ({"mergers": [Pipeline(finisher=GroupScale({"no.such": 1.0}))]}, "'pipeline': .* got 'no.such'"),
        (
            {"mergers": [MagMax()], "branches": 2, "rounds": 2, "branch_merger": TIES(weights=[1.0, 1.0])},
            "'branch_merger': expected one entry for each of the 4 tasks",
        ),
    ],
)
def test_settings_that_do_not_fit_the_stream_are_refused_when_the_learner_is_made(clip, options, message):
    with pytest.raises(ValueError, match=message):
        make_learner(clip, **options)
