from dataclasses import asdict

import pytest
import torch
from support.calibrated_runs import learner, run
from support.toy_backbone import Normed

from clmerge.deploy.calibration import Surgery
from clmerge.deploy.calibration.operated import FEATURES, Surgical, behind_blocks, copy_with, from_tensors, split_state
from clmerge.deploy.calibration.surgery import adapter_bytes
from clmerge.merging import MagMax, WeightAverage
from clmerge.models import LinearHead, Linearized
from clmerge.report.rules import rule_of
from clmerge.results.run_folder import RunFolder
from clmerge.runs.final_predictors import FinalPredictors
from clmerge.runs.loaded_run import load_run
from clmerge.streams import AdaptationData
from clmerge.weights.parametrization import running_statistics

CPU = torch.device("cpu")
BUFFER = AdaptationData("buffer", per_class=4)


pytestmark = pytest.mark.usefixtures("no_pictures")


def operated(one, state):
    return from_tensors(copy_with(one.module, state), split_state(state)[1]).eval()


def images_of(one, task):
    images = BUFFER.images(one.data, range(len(one.tasks)))[task]
    return torch.stack([images[index][0] for index in range(len(images))])


def distances(one, state, task, expert):
    """Mean distance to the expert's features of a task's images, before and after its adapter."""
    model = operated(one, state)
    batch = images_of(one, task)
    with torch.no_grad():
        z = model.classifier.backbone(batch)
        changed = model._final(z, torch.full((len(z),), task))
    return (z - expert).abs().mean(), (changed - expert).abs().mean()


@pytest.mark.parametrize("head", [None, LinearHead])
def test_adapters_of_all_tasks_bring_features_back_to_the_experts(clip, tmp_path, head):
    calibrations = [Surgery(adaptation=BUFFER, lr=1e-2, steps=150), Surgery(adaptation=BUFFER, routed=False, steps=5)]
    one = learner(clip, *calibrations, mergers=[WeightAverage(), MagMax()], num_tasks=3, head=head and head())
    results = run(one, tmp_path / "run")
    merged = one.merged()
    states = one.calibrated.models(merged, 2, CPU)
    for name in ("magmax", "weight_average"):
        for task in range(3):
            outputs = calibrations[0].experts[task]
            assert len(outputs[FEATURES]) == 4 * len(one.tasks[task].classes)
            before, after = distances(one, states[f"{name}+surgery"], task, outputs[FEATURES])
            assert after < 0.8 * before
    told, routed = (results.model(f"magmax+{name}") for name in ("surgery_told", "surgery"))
    assert told.needs_task
    assert not routed.needs_task
    assert told.data == routed.data == "buffer(4 per class, unlabelled)"
    adapters, images, experts = adapter_bytes([8], 16), 40 * 3 * 8 * 8, 40 * (4 * 8 + 8)
    assert results.bytes["calibration.surgery"] == 2 * 3 * (adapters + 4 * 8) + images + experts
    assert results.bytes["calibration.surgery_told"] == 2 * 3 * adapters + images + experts
    assert routed.bytes_kept[-1] - results.model("magmax").bytes_kept[-1] == 3 * (adapters + 32) + images + experts

    # The results say by what, on what, and from where; task-agnostic accuracies come with those of the routing.
    rule = results.to_dict()["models"]["magmax+surgery"]["rule"]
    assert rule["calibration"]["class_path"] == "Surgery"
    assert rule["calibration"]["init_args"]["adaptation"] == asdict(BUFFER)
    assert {"2407.06322", "2402.02705"} <= set(rule_of(rule).sources)
    assert "routing_accuracy" in routed.probes
    assert "routing_accuracy" not in told.probes

    # What is saved is what was evaluated, and is run by commands alone.
    folder = RunFolder.open(tmp_path / "run", writes=False)
    statistics = running_statistics(one.module)
    models = FinalPredictors(folder, one.mergers, buffers="latest", statistics=statistics)
    batch = next(iter(one.data.eval_dataloader("test", [0])))[0]
    with torch.no_grad():
        expected = Surgical(
            from_tensors(copy_with(one.module, states["magmax+surgery"]), split_state(states["magmax+surgery"])[1])
        )
        found = models.predictor("magmax+surgery", one.module)
        assert torch.equal(found.model(batch), expected.model(batch))
    assert models.predictor("magmax+surgery_told", one.module).needs_task
    with pytest.raises(ValueError, match=r"weights of the backbone alone, got 'magmax\+surgery', which has adapters"):
        load_run(tmp_path / "run").predictor("magmax+surgery")


def test_deep_adapters_lower_the_loss_behind_every_block(clip, tmp_path):
    surgery = Surgery(adaptation=BUFFER, deep=True, lr=1e-2, steps=20)
    one = learner(clip, surgery)
    results = run(one, tmp_path / "run")
    (state,) = one.calibrated.models(one.merged(), 1, CPU).values()
    places = {name.removeprefix("surgery.").rpartition(".")[0] for name in state if name.startswith("surgery.")}
    blocks = {f"model.visual.transformer.resblocks.{index}" for index in range(2)}
    assert places == {FEATURES, *blocks}
    assert set(surgery.experts[1]) == {FEATURES, *blocks}
    model, means = operated(one, state), {}
    tasks = torch.ones(len(batch := images_of(one, 1)), dtype=torch.long)

    def act(place, z):
        changed = model._places[place](z, tasks)
        means[place] = (z.mean(1), changed.mean(1))
        return changed

    with torch.no_grad():
        with behind_blocks(model.classifier.backbone, list(blocks), act):
            z = model.classifier.backbone(batch)
        means[FEATURES] = (z, model._final(z, tasks))
    wanted = surgery.experts[1]
    losses = [sum((means[place][side] - wanted[place]).abs().mean() for place in wanted) for side in range(2)]
    assert losses[1] < losses[0]
    assert results.model("weight_average+surgery2").bytes_kept[-1] > 0


def test_no_step_is_the_merged_model(clip, tmp_path):
    one = learner(clip, Surgery(deep=True, routed=False, steps=0))
    results = run(one, tmp_path / "run")
    merged, operated = (
        results.matrix(name, "task_aware") for name in ("weight_average", "weight_average+surgery2_told")
    )
    known = torch.tensor([[True, False], [True, True]]).numpy()
    assert merged[known].tolist() == operated[known].tolist()


def test_sizes_are_the_papers():
    assert adapter_bytes([512], 16) == 64 * 2**10
    assert adapter_bytes([512, *[768] * 12], 16) == 4 * 311296


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: Surgery(adaptation=AdaptationData("current")), {}, "images of all tasks so far for Surgery"),
        (
            lambda: Surgery(deep=True),
            {"backbone": Normed(), "head": LinearHead()},
            "transformer, whose blocks get",
        ),
        (lambda: Surgery(deep=True), {"tuning": Linearized()}, "transformer, whose blocks get"),
        (lambda: Surgery(rank=0), {}, "rank of 1 or more"),
        (lambda: Surgery(lr=0.0), {}, "a positive lr"),
    ],
)
def test_what_surgery_cannot_do_is_refused_before_anything_is_trained(clip, make, options, message):
    with pytest.raises(ValueError, match=message):
        learner(clip, make(), **options)
