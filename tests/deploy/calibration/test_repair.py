import pytest
import torch
from support.calibrated_runs import learner, run
from support.toy_backbone import Normed
from torch.utils.data import DataLoader

from clmerge.deploy.calibration import Repair
from clmerge.deploy.calibration.channels import Channels, Spread, matched_layers, spreads
from clmerge.merging import MagMax, TaskArithmetic
from clmerge.models import LinearHead, Linearized, LoRA, Partial
from clmerge.streams import AdaptationData
from clmerge.weights import load_tensors
from clmerge.weights.modes import eval_mode
from clmerge.weights.parametrization import folded
from clmerge.weights.swap import swapped

CPU = torch.device("cpu")
LAYERS = [f"backbone.model.visual.transformer.resblocks.{i}.{part}" for i in range(2) for part in ("attn", "mlp.c_fc")]


pytestmark = pytest.mark.usefixtures("no_pictures")


def measured(one, state, names, tasks):
    """Mean over tasks of the spreads with other weights in the module, on all validation images of the tasks."""
    with swapped(one.module, state), folded(one.module) as network, eval_mode(network):
        layers = [Channels(name, network.get_submodule(name)) for name in names]
        found = []
        for task in range(tasks):
            images = one.stream.dataset(task, "val", one.module.backbone.eval_transform)
            batches = (batch for batch, _ in DataLoader(images, batch_size=64))
            found.append(spreads(layers, network, batches))
    return {name: Spread.average([each[name] for each in found]) for name in names}


@pytest.mark.parametrize("tuning", [None, LoRA(rank=2)])
def test_every_layer_of_the_repaired_model_has_the_goals(clip, tmp_path, tuning):
    one = learner(clip, Repair(), tuning=tuning, mergers=[TaskArithmetic(1.5), MagMax()], num_tasks=3)
    results = run(one, tmp_path / "run")
    (repair,) = one.calibrated.calibrations.values()
    assert list(repair.goals) == LAYERS
    assert results.model("magmax+repaired").data == "val(unlabelled)"
    merged = one.merged()
    states = one.calibrated.models(merged, 2, CPU)
    for name in ("magmax", "task_arithmetic"):
        before, after = (measured(one, state, LAYERS, 3) for state in (merged[name], states[f"{name}+repaired"]))
        for layer, goal in repair.goals.items():
            torch.testing.assert_close(after[layer].mean, goal.mean, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(after[layer].std, goal.std, rtol=1e-3, atol=0)
        assert max((before[layer].std / goal.std - 1).abs().max() for layer, goal in repair.goals.items()) > 0.005
    channels = sum(len(goal.mean) for goal in repair.goals.values())
    assert channels == 2 * (3 * 8 + 4 * 8)
    assert results.bytes == {"calibration.repaired": 8 * channels}
    state = states["magmax+repaired"]
    with swapped(one.module, state), folded(one.module.backbone):
        dense = {name: tensor.clone() for name, tensor in one.module.backbone.model.state_dict().items()}
    saved = load_tensors(tmp_path / "run" / "model" / "magmax+repaired.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in dense.items())


def test_goals_are_those_of_the_experts_and_one_task_needs_no_repair(clip, tmp_path):
    data = AdaptationData("buffer", per_class=3)
    one = learner(clip, Repair(adaptation=data), num_tasks=1)
    results = run(one, tmp_path / "run")
    (repair,) = one.calibrated.calibrations.values()
    merged = one.merged()
    (state,) = one.calibrated.models(merged, 0, CPU).values()
    for name, tensor in merged["weight_average"].items():  # one task: the merged model is the expert
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)
    assert results.model("weight_average+repaired").data == "buffer(3 per class, unlabelled)"
    assert results.bytes == {"calibration.repaired": 8 * 2 * 56 + 30 * 3 * 8 * 8}
    assert repair.tasks == 1


def test_running_statistics_are_those_of_the_merged_model_on_all_tasks(tmp_path):
    one = learner(None, Repair(), backbone=Normed(), head=LinearHead())
    run(one, tmp_path / "run")
    (state,) = one.calibrated.models(one.merged(), 1, CPU).values()
    images = [image for task in range(2) for image, _ in one.stream.dataset(task, "val", Normed().eval_transform)]
    linear = {name.rpartition(".")[2]: tensor for name, tensor in state.items() if ".model.1." in name}
    rows = torch.stack(images).flatten(1) @ linear["weight"].T + linear["bias"]
    norm = "backbone.model.2.running_"
    torch.testing.assert_close(state[f"{norm}mean"], rows.mean(0), rtol=1e-2, atol=1e-2)  # the mean over the batches
    torch.testing.assert_close(state[f"{norm}var"], rows.var(0), rtol=0.1, atol=1e-3)


@pytest.mark.parametrize(
    ("calibration", "options", "message"),
    [
        (
            Repair(adaptation=AdaptationData("current")),
            {},
            "images of all tasks so far for Repair, got those of",
        ),
        (Repair(targets=["*.nothing"]), {}, r"trained layers that match \['\*.nothing'\], or batch normalisation"),
        (Repair(), {"tuning": Partial("*.ln_*")}, "trained layers that match"),
        (Repair(), {"tuning": Linearized()}, "dense weights to rescale for Repair"),
    ],
)
def test_what_cannot_be_repaired_is_refused_before_anything_is_trained(clip, calibration, options, message):
    with pytest.raises(ValueError, match=message):
        learner(clip, calibration, **options)


def test_no_targets_are_refused():
    with pytest.raises(ValueError, match="expected targets, glob patterns of layers, got none"):
        Repair(targets=[])


def test_matched_layers_of_a_tiny_clip(clip):
    one = learner(clip)
    found = matched_layers(one.module, Repair().targets, one.module.trained_names)
    assert [layer.name for layer in found] == LAYERS
