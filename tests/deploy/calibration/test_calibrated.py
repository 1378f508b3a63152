import pytest
import torch
from lightning.pytorch import Callback
from support.calibrated_runs import adam, build, learner, run
from support.records import record, without_times
from torch.nn import functional

from clmerge.deploy.calibration import HeadAlignment, HeadRotation, Repair, SampleTuning, Surgery
from clmerge.deploy.calibration.alignment import gap, local_loss, normalized
from clmerge.merging import MagMax, WeightAverage
from clmerge.models import CosineHead, Frozen, Full, LinearHead, LoRA, ZeroShotHead
from clmerge.results.run_folder import RunFolder
from clmerge.training.sharpness import SAM
from clmerge.weights import load_tensors

pytestmark = pytest.mark.usefixtures("no_pictures")


def seen_loss(one, state, images, labels, tasks):
    """Cross-entropy over the classes of the first ``tasks`` tasks, with other weights in the module."""
    classes = sorted({c for task in one.tasks[:tasks] for c in task.classes})
    with torch.no_grad():
        logits = torch.func.functional_call(one.module.eval(), state, (images,))[:, classes]
    return float(functional.cross_entropy(logits, torch.searchsorted(torch.tensor(classes), labels)))


@pytest.mark.parametrize(("head", "tuning", "optimizer"), [(ZeroShotHead, Full, SAM), (LinearHead, LoRA, adam)])
def test_a_tuned_model_is_one_of_its_own_and_fits_the_buffer_better(clip, tmp_path, head, tuning, optimizer):
    if optimizer is SAM:
        optimizer = lambda parameters: SAM(parameters, adam)  # noqa: E731
    plain, tuned = (
        learner(clip, *steps, head=head(), tuning=tuning(), optimizer=optimizer, mergers=[WeightAverage(), MagMax()])
        for steps in ([], [SampleTuning(per_class=4, epochs=3)])
    )
    expected = without_times(run(plain, tmp_path / "plain").to_dict())["models"]
    found = without_times(run(tuned, tmp_path / "tuned").to_dict())
    assert found["models"]["magmax+tuned"]["data"] == "buffer(4 per class)"
    assert found["models"]["magmax+tuned"]["kind"] == "calibrated"
    assert set(found["models"]) == {*expected, "weight_average+tuned", "magmax+tuned"}
    assert all(found["models"][name] == expected[name] for name in expected)  # nothing else has changed by a bit
    for key, value in plain.module.state_dict().items():
        assert torch.equal(value, tuned.module.state_dict()[key])

    (tuning_step,) = tuned.calibrated.calibrations.values()
    images = tuning_step.buffer(tuned.data, 1, tuned.module.backbone.eval_transform)
    assert sorted(images.targets) == [c for c in range(10) for _ in range(4)]
    assert found["bytes"] == {"calibration.tuned": 40 * 3 * 8 * 8}
    batch = torch.stack([images[i][0] for i in range(len(images))])
    merged = tuned.merged()
    states = merged | tuned.calibrated.models(merged, 1, torch.device("cpu"))
    labels = torch.tensor(images.targets)
    for name in ("weight_average", "magmax"):
        before, after = (seen_loss(tuned, states[key], batch, labels, 2) for key in (name, f"{name}+tuned"))
        assert after < before
    saved = load_tensors(tmp_path / "tuned" / "model" / "magmax+tuned.safetensors")
    plain.module.backbone.model.load_state_dict(saved, strict=tuning is Full)
    assert (tmp_path / "tuned" / "model" / "magmax+tuned-head.safetensors").is_file() == (head is not ZeroShotHead)


def test_what_is_saved_of_a_tuned_model_is_what_was_evaluated(clip, tmp_path):
    one = learner(clip, SampleTuning(per_class=4, epochs=2), head=LinearHead())
    results = run(one, tmp_path / "run")
    folder = tmp_path / "run" / "model"
    one.module.backbone.model.load_state_dict(load_tensors(folder / "weight_average+tuned.safetensors"))
    one.module.head.load_state_dict(load_tensors(folder / "weight_average+tuned-head.safetensors"))
    one.module.eval()
    hits = {0: [], 1: []}
    with torch.no_grad():
        for images, labels, tasks in one.data.eval_dataloader("test"):
            for hit, task in zip(one.module(images).argmax(1) == labels, tasks.tolist(), strict=True):
                hits[task].append(float(hit))
    expected = [sum(hits[task]) / len(hits[task]) for task in range(2)]
    assert results.matrix("weight_average+tuned")[-1].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_buffer_is_balanced_seeded_and_never_takes_back_what_it_dropped(clip):
    one = learner(clip, SampleTuning(per_class=3), num_tasks=5)
    one.data.setup_stream(one.stream, None, None)
    (step,) = one.calibrated.calibrations.values()
    earlier = set()
    for task in range(5):
        images = step.buffer(one.data, task)
        places = {(id(part.plan.images), i) for part in images.parts for i in part.plan.indices}
        assert sorted(images.targets) == [c for c in range(2 * task + 2) for _ in range(3)]
        assert earlier <= places
        earlier = places
    one.data.seed = 1
    assert {i for part in step.buffer(one.data, 4).parts for i in part.plan.indices} != {i for _, i in earlier}


@pytest.mark.parametrize("head", [LinearHead, CosineHead])
def test_alignment_trains_the_head_alone_and_on_all_classes(clip, tmp_path, head):
    """After a head whose old rows have drifted away, alignment gets the old task's accuracy back."""
    one = learner(clip, HeadAlignment(epochs=20, lr=0.1), head=head())
    results = run(one, tmp_path / "run")
    merged = one.merged()
    (state,) = one.calibrated.models(merged, 1, torch.device("cpu")).values()
    changed = {key for key, value in state.items() if key not in merged["weight_average"]}
    assert changed == {"head.blocks.0", "head.blocks.1"}
    assert all(torch.equal(state[key], value) for key, value in merged["weight_average"].items())
    batches = list(one.data.eval_dataloader("train"))
    images, labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    assert seen_loss(one, state, images, labels, 2) != seen_loss(one, merged["weight_average"], images, labels, 2)
    before, after = (results.matrix(name)[-1].mean() for name in ("weight_average", "weight_average+aligned"))
    assert after > before
    first = [results.matrix(name)[0, 0] for name in ("weight_average", "weight_average+aligned")]
    assert first[0] == first[1]  # the first task needs no alignment
    kept = 10 * (4 * (8 + 64) + 16)
    assert results.bytes == {"calibration.aligned": kept}


def test_gaussians_are_those_of_the_merged_model_when_its_task_was_merged(clip, tmp_path):
    one = learner(clip, HeadAlignment(), head=LinearHead())
    states = []

    class Watch(Callback):
        def on_fit_start(self, trainer, pl_module):
            if one.merge.num_tasks:  # a fit is merged when all callbacks are done with it
                states.append(one.merged()["weight_average"])

    run(one, tmp_path / "run", [Watch()])
    states.append(one.merged()["weight_average"])
    gaussians = one.calibrated.calibrations["aligned"].gaussians["weight_average"]
    assert gaussians.classes.tolist() == list(range(10))
    for task in range(2):
        loader = one.data.eval_dataloader("train", [task])
        one.module.load_state_dict(states[task], strict=False)
        one.module.eval()
        with torch.no_grad():
            found = [(one.module.backbone(images).double(), labels) for images, labels, _ in loader]
        features, labels = torch.cat([f for f, _ in found]), torch.cat([y for _, y in found])
        for label in one.tasks[task].classes:
            own = features[labels == label]
            torch.testing.assert_close(gaussians.means[label].double(), own.mean(dim=0), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(gaussians.covariances[label].double(), torch.cov(own.T), rtol=1e-4, atol=1e-4)


def test_normalized_logits_by_hand():
    logits = torch.tensor([[3.0, 4.0, 0.0, 2.0]], dtype=torch.float64)
    groups = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    torch.testing.assert_close(normalized(logits, groups), logits / 3.5, rtol=1e-6, atol=0)


def test_the_robust_loss_by_hand():
    """Class 0: losses 1, 2, 4 near their mean (difference 2.0), 9 is not; class 1: none is near, so all count."""
    losses = torch.tensor([1.0, 2.0, 4.0, 9.0, 3.0, 5.0], dtype=torch.float64, requires_grad=True)
    labels, nearest = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 0, 0])
    found = local_loss(losses, labels, nearest, 0.1)
    assert found.item() == pytest.approx((7 / 3 + 0.1 * 2.0 + 4.0) / 2)
    found.backward()
    assert losses.grad[3] == 0
    assert gap(losses[:1]).item() == 0.0


def test_the_robust_term_changes_the_head_and_nothing_drawn(clip, tmp_path):
    plain, robust = (learner(clip, HeadAlignment(epochs=2, robust=weight), head=LinearHead()) for weight in (0.0, 0.1))
    rows = []
    for index, one in enumerate((plain, robust)):
        run(one, tmp_path / str(index))
        (state,) = one.calibrated.models(one.merged(), 1, torch.device("cpu")).values()
        rows.append(state["head.blocks.0"])
    gaussians = [one.calibrated.calibrations["aligned"].gaussians["weight_average"] for one in (plain, robust)]
    assert torch.equal(*(each.means for each in gaussians))
    assert not torch.equal(*rows)


class DieInTheLastTask(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if len(pl_module._seen_classes) == 10 and batch_idx == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_has_the_same_calibrated_models(clip, tmp_path):
    def make():
        more = [Repair(), HeadRotation(), Surgery(steps=2), Surgery(steps=1, deep=True)]
        return learner(clip, SampleTuning(per_class=2, epochs=1), HeadAlignment(epochs=1), *more, head=LinearHead())

    run(make(), tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(make(), tmp_path / "killed", [DieInTheLastTask()])
    make().fit(RunFolder.open(tmp_path / "killed"), trainer=build)
    documents = [without_times(record(tmp_path / name)) for name in ("whole", "killed")]
    assert documents[0]["models"] == documents[1]["models"]
    assert documents[0]["bytes"] == documents[1]["bytes"]
    for path in (tmp_path / "whole" / "model").glob("*.safetensors"):
        expected, found = load_tensors(path), load_tensors(tmp_path / "killed" / "model" / path.name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    with pytest.raises(ValueError, match=r"expected calibrations \['SampleTuning\(per_class=2, epochs=1\)', 'HeadAl"):
        learner(clip, SampleTuning(), head=LinearHead()).fit(RunFolder.open(tmp_path / "killed"), trainer=build)
    with pytest.raises(RuntimeError, match=r"expected the state of calibrations \['tuned'\]"):
        learner(clip, SampleTuning(), head=LinearHead()).calibrated.load_state_dict({})


@pytest.mark.parametrize(
    ("calibrations", "options", "message"),
    [
        ([HeadAlignment()], {}, "a head that learns its classes for HeadAlignment, got ZeroShotHead"),
        ([SampleTuning(), SampleTuning()], {}, "calibrations of different kinds"),
        ([SampleTuning()], {"head": LinearHead(), "tuning": Frozen()}, "got a frozen one"),
        ([SampleTuning()], {"mergers": {"a": MagMax(), "a+tuned": MagMax(0.5)}}, r"merger than 'a\+tuned'"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_anything_is_trained(clip, calibrations, options, message):
    with pytest.raises(ValueError, match=message):
        learner(clip, *calibrations, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SampleTuning, {"per_class": 0}),
        (SampleTuning, {"epochs": 0}),
        (HeadAlignment, {"lr": 0.0}),
        (HeadAlignment, {"temperature": 0.0}),
        (HeadAlignment, {"robust": -0.1}),
    ],
)
def test_wrong_settings_are_refused(kind, options):
    with pytest.raises(ValueError, match="expected"):
        kind(**options)
