import pytest
import torch
from support.calibrated_runs import learner, run
from support.toy_backbone import Normed
from torch import nn

from clmerge.deploy.calibration import Repair, Tent
from clmerge.deploy.calibration.operated import copy_with
from clmerge.models import LinearHead, Linearized, LoRA
from clmerge.streams import AdaptationData

CPU = torch.device("cpu")
FEW = AdaptationData("buffer", per_class=3, batch_size=100)  # a step sees all of them


pytestmark = pytest.mark.usefixtures("no_pictures")


def entropy(one, state, data, heads):
    """The entropy of a model with other weights, summed over the tasks, and that model: in float64."""
    twin = copy_with(one.module, state).double().eval().requires_grad_(True)
    seen = sorted(c for task in one.tasks for c in task.classes)
    total = torch.zeros((), dtype=torch.float64)
    for task, images in data.images(one.data, range(len(one.tasks))).items():
        batch = torch.stack([image for image, _ in images]).double()
        p = twin(batch)[:, seen if heads == "seen" else list(one.tasks[task].classes)].softmax(dim=1)
        total = total - (p * p.log()).sum(dim=1).mean()
    return total, twin


@pytest.mark.parametrize(("heads", "tuning"), [("seen", None), ("task", LoRA(rank=2))])
def test_a_step_is_one_of_adam_on_the_entropy_and_moves_normalisation_layers_alone(clip, tmp_path, heads, tuning):
    one = learner(clip, Tent(adaptation=FEW, heads=heads, steps=1), tuning=tuning)
    results = run(one, tmp_path / "run")
    assert results.model("weight_average+tent").data == "buffer(3 per class, unlabelled)"
    merged = one.merged()
    (state,) = one.calibrated.models(merged, 1, CPU).values()
    before = {**dict(one.module.named_parameters()), **merged["weight_average"]}
    moves = {name: (tensor - before[name]).double().detach() for name, tensor in state.items()}
    loss, twin = entropy(one, merged["weight_average"], FEW, heads)
    places = [path for path, part in twin.named_modules() if isinstance(part, nn.LayerNorm) and ".visual." in path]
    assert {name for name, move in moves.items() if move.any()} == {
        f"{p}.{w}" for p in places for w in ("weight", "bias")
    }
    own = dict(twin.named_parameters())
    names = [f"{place}.{kind}" for place in places for kind in ("weight", "bias")]
    sure = 0
    for name, slope in zip(names, torch.autograd.grad(loss, [own[name] for name in names]), strict=True):
        clear = slope.abs() > 1e-4
        sure += int(clear.sum())
        torch.testing.assert_close(moves[name][clear], -1e-3 * slope.sign()[clear], rtol=1e-2, atol=0)
    assert sure > 20


def test_the_images_of_the_evaluation_are_used_if_they_are_named_and_predictions_become_surer(clip, tmp_path):
    data = AdaptationData("test")
    one = learner(clip, Tent(adaptation=data, steps=20, lr=0.01))
    results = run(one, tmp_path / "run")
    assert results.model("weight_average+tent").data == "test(transductive, unlabelled)"
    merged = one.merged()
    (state,) = one.calibrated.models(merged, 1, CPU).values()
    before, after = (entropy(one, each, data, "seen")[0].item() for each in (merged["weight_average"], state))
    assert after < 0.95 * before


def test_running_statistics_are_estimated_anew_as_for_repair(tmp_path):
    one = learner(None, Repair(), Tent(steps=3), backbone=Normed(), head=LinearHead())
    run(one, tmp_path / "run")
    before = one.merged()["weight_average"]
    states = one.calibrated.models({"weight_average": before}, 1, CPU)
    repaired, tent = (states[f"weight_average+{name}"] for name in ("repaired", "tent"))
    norm = "backbone.model.2."
    assert {name for name in before if not torch.equal(tent[name], before[name])} == {f"{norm}weight", f"{norm}bias"}
    for kind in ("running_mean", "running_var"):  # of the same images in other batches
        torch.testing.assert_close(tent[f"{norm}{kind}"], repaired[f"{norm}{kind}"], rtol=0.1, atol=1e-2)


class Plain(Normed):
    def __init__(self):
        super().__init__()
        self.model[2] = nn.Identity()


@pytest.mark.parametrize(
    ("calibration", "options", "message"),
    [
        (Tent(adaptation=AdaptationData("current")), {}, "images of all tasks so far for Tent, got those of"),
        (Tent(), {"tuning": Linearized()}, "ordinary layers to tune for Tent"),
        (Tent(), {"backbone": Plain(), "head": LinearHead()}, "normalisation layers with weights for Tent, got none"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything_is_trained(clip, calibration, options, message):
    with pytest.raises(ValueError, match=message):
        learner(clip, calibration, **options)


@pytest.mark.parametrize("settings", [{"steps": -1}, {"lr": 0.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="expected steps of 0 or more and a positive lr"):
        Tent(**settings)
