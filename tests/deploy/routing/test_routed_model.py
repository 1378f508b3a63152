import subprocess
import sys

import pytest
import torch
from support.routed import images_of, make_frame, mean_of, routed, task_end
from torch import nn
from torch.nn import functional

from clmerge.deploy.predictors import Merged
from clmerge.deploy.routing import (
    DAM,
    ExpertConfidence,
    GaussianPosterior,
    Mingle,
    NearestCentroid,
    PWEMoE,
    Retrieval,
    Smile,
    TaskOracle,
    TwinMerging,
    WEMoE,
    load_routed,
)
from clmerge.deploy.routing.experts import experts_of, mixed_layers
from clmerge.deploy.routing.routed import Routed, RoutedByTask
from clmerge.models import LinearHead, OpenClip
from clmerge.results.model_facts import ModelFacts
from clmerge.weights import save_tensors

ROUTINGS = {
    "Smile": lambda: Smile(rank=4, gate_k=2),
    "Smile of two": lambda: Smile(rank=None, gate_k=3, top_k=2),
    "DAM": lambda: DAM(rank=4, temperature=0.5),
    "NearestCentroid": lambda: NearestCentroid(rank=4),
    "Retrieval": lambda: Retrieval(rank=4, top_k=2),
    "GaussianPosterior": lambda: GaussianPosterior(rank=4),
    "ExpertConfidence": lambda: ExpertConfidence(rank=4),
    "TaskOracle": lambda: TaskOracle(rank=4),
    "WEMoE": lambda: WEMoE(steps=2),
    "E-WEMoE": lambda: WEMoE(steps=2, density=0.3, shared_gate=True, heads="seen"),
    "TwinMerging": lambda: TwinMerging(rank=4, steps=5, per_class=8),
    "Mingle": lambda: Mingle(rank=4, steps=3, directions=2, lr=0.1),
    "PWEMoE": lambda: PWEMoE(steps=2, preference=[1.0, 2.0, 1.0]),
}


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    return make_frame(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def images():
    return torch.cat([images_of(task, 2) for task in range(3)])


@pytest.fixture(params=list(ROUTINGS))
def routing(request):
    return ROUTINGS[request.param]()


@torch.no_grad()
def test_logits_of_an_image_are_the_same_alone_and_in_any_batch(routing, frame, images):
    model = routed(routing, frame)
    together = model(images)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.allclose(model(images[order]), together[order], rtol=0, atol=1e-11)
    for position in range(len(images)):
        alone = model(images[position : position + 1])
        assert torch.allclose(alone, together[position : position + 1], rtol=0, atol=1e-11)


@torch.no_grad()
def test_the_order_of_the_tasks_does_not_matter(routing, frame, images):
    if isinstance(routing, Mingle | WEMoE | TwinMerging | PWEMoE):
        pytest.skip("its gates are trained")
    merged = mean_of(frame, [task_end(frame, task) for task in range(3)])
    one = routed(routing, frame, merged=merged)
    expected = one(images)
    other = routed(routing, frame, (2, 0, 1), merged=merged)
    assert torch.allclose(other(images), expected, rtol=0, atol=1e-9)
    columns = [other.tasks.index(task) for task in one.tasks]
    assert torch.allclose(other.choices()[:, columns], one.choices())


def test_what_is_kept_is_exact_online_and_counted(routing, frame):
    routed(routing, frame)
    whole = routing.state_dict()
    again = type(routing)(**routing.settings())
    for task in range(2):
        again.collect(task_end(frame, task))
    state = again.state_dict()
    again.load_state_dict(state)
    again.collect(task_end(frame, 2))
    found, expected = (list(tensors_in(one)) for one in (again.state_dict(), whole))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if isinstance(routing, WEMoE | PWEMoE | TwinMerging):
        return  # whose gates are made when a model is built
    wide = sum(tensor.numel() * min(tensor.element_size(), 4 if tensor.is_floating_point() else 8) for tensor in found)
    assert routing.nbytes(frame, [task_end(frame, task).classes for task in range(3)]) == wide


def tensors_in(state):
    for value in state.values() if isinstance(state, dict) else [state]:
        if isinstance(value, dict):
            yield from tensors_in(value)
        else:
            yield value


@torch.no_grad()
def test_a_saved_model_answers_the_same(routing, frame, images, tmp_path):
    model = routed(routing, frame)
    facts = ModelFacts(
        "a+b", "run", {"class": "OpenClip", "settings": {"name": frame.backbone.name}}, "", "", None, "", ["a"], []
    )
    model.save(tmp_path / "model.safetensors", facts)
    found = load_routed(tmp_path / "model.safetensors")
    assert found.tasks == model.tasks
    assert torch.allclose(found(images), model(images), rtol=0, atol=1e-11)
    assert {name: tensor.tolist() for name, tensor in found.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in model.state_dict().items()
    }


def test_the_encoder_shares_what_is_equal(frame, tmp_path):
    model = routed(DAM(rank=2), frame)
    model.save(tmp_path / "model.safetensors")
    for one in (model, load_routed(tmp_path / "model.safetensors", OpenClip(frame.backbone.name).double())):
        apart = [p for p in one.encoder.parameters() if not any(p is other for other in one.backbone.parameters())]
        moved = [name for name in frame.base if ".mlp." not in name]
        assert len(apart) == len(moved)  # theta_0 and the merged weights outside of the mixed layers


@torch.no_grad()
@pytest.mark.parametrize("make", [Smile, TaskOracle])
def test_one_task_at_full_rank_is_the_experts_own_layers(make, frame, images):
    routing = make(rank=None)
    end = task_end(frame, 0)
    model = routed(routing, frame, (0,), merged={name: base + end.tau[name] for name, base in frame.base.items()})
    expert = frame.model({name: base + end.tau[name] for name, base in frame.base.items()})
    assert torch.allclose(model(images), frame.head(expert(images)), rtol=0, atol=1e-10)


@torch.no_grad()
def test_given_gates_mix_the_experts_of_the_mixed_layers(frame, images):
    model = routed(TaskOracle(rank=None), frame)
    ends = [task_end(frame, task) for task in range(3)]
    gates = torch.tensor([0.2, 0.5, -0.1], dtype=torch.float64)
    mixed = mean_of(frame, ends)
    for layer in mixed_layers(frame.backbone, "mlp", frame.base):
        for name in (f"{layer}.weight", f"{layer}.bias"):
            mixed[name] = frame.base[name] + sum(g * end.tau[name] for g, end in zip(gates, ends, strict=True))
    expected = frame.head(frame.model(mixed)(images))
    assert torch.allclose(model.answer(images, gates.expand(6, 3)), expected, rtol=0, atol=1e-10)
    oracle = RoutedByTask(model)
    oracle.prepare(lambda make: make())
    tasks = torch.tensor([0, 0, 1, 1, 2, 2])
    scores = oracle.scores(Pass(images), tasks)
    alone = torch.cat(
        [model.answer(i[None], functional.one_hot(t, 3)[None].double()) for i, t in zip(images, tasks, strict=True)]
    )
    assert torch.allclose(scores, alone.float(), atol=1e-5)
    assert [oracle.knows(task) for task in (0, 2, 3)] == [True, True, False]


class Pass:
    def __init__(self, images):
        self.images = images


@torch.no_grad()
def test_routers_by_features_find_the_tasks(frame):
    images = torch.cat([images_of(task) for task in range(3)])
    for make in (NearestCentroid, GaussianPosterior):
        predictor = Routed(routed(make(rank=2), frame))
        predictor.scores(Pass(images), torch.zeros(12, dtype=torch.long))
        tasks, shares = predictor.choices
        assert tasks == (0, 1, 2)
        assert shares.argmax(dim=1).tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_the_head_is_taken_at_the_beginning_of_a_pass(frame, images):
    model = routed(TaskOracle(rank=2), frame)
    head = make_frame_head(frame)
    predictor = Routed(model, head)
    head.weight.mul_(0.0)
    predictor.prepare(lambda make: make())
    head.weight.add_(1.0)  # as other predictors do, whose weights are exchanged meanwhile
    with torch.no_grad():
        assert not predictor.scores(Pass(images), torch.zeros(6, dtype=torch.long)).any()


def make_frame_head(frame):
    import copy

    return copy.deepcopy(frame.head)


@pytest.mark.parametrize("name", ["Smile", "DAM"])
def test_a_model_is_exported_for_batches_of_any_size(name, frame, images):
    model = routed(ROUTINGS[name](), frame)
    program = torch.export.export(model, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    with torch.no_grad():
        assert torch.allclose(program.module()(images[:3]), model(images[:3]), rtol=0, atol=1e-10)


def test_importing_and_loading_needs_no_training_stack(frame, images, tmp_path):
    model = routed(Smile(rank=2, gate_k=1), frame).float()
    facts = ModelFacts(
        "a+b", "run", {"class": "OpenClip", "settings": {"name": frame.backbone.name}}, "", "", None, "", ["a"], []
    )
    file = tmp_path / "model.safetensors"
    model.save(file, facts)
    code = (
        "import sys, torch; from clmerge.deploy.routing import load_routed; "
        "light = 'open_clip' not in sys.modules; "
        f"model = load_routed({str(file)!r}); print(tuple(model(torch.zeros(2, 3, 8, 8)).shape)); "
        "print(light, [m for m in ('lightning', 'avalanche', 'torchmetrics') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-2:] == ["(2, 5)", "True []"]


def test_a_learned_head_is_saved_with_the_model(frame, images, tmp_path):
    head = LinearHead()
    head.build(frame.backbone, 7, ())
    head.add_classes([3, 5])
    model = routed(TaskOracle(rank=2), frame)
    model.head = head.double()
    model.save(tmp_path / "model.safetensors")
    found = load_routed(tmp_path / "model.safetensors", OpenClip(frame.backbone.name).double())
    with torch.no_grad():
        assert torch.equal(found(images).isfinite(), model(images).isfinite())
        assert torch.allclose(found(images)[:, [3, 5]], model(images)[:, [3, 5]], rtol=0, atol=1e-11)
    model.head = nn.Linear(8, 2).double()
    with pytest.raises(ValueError, match="expected a head of clmerge"):
        model.save(tmp_path / "other.safetensors")


def test_other_files_are_refused(frame, tmp_path):
    save_tensors(tmp_path / "plain.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="expected the file of a routed model"):
        load_routed(tmp_path / "plain.safetensors")
    model = routed(TaskOracle(rank=2), frame)
    model.save(tmp_path / "nameless.safetensors")
    with pytest.raises(ValueError, match="names a backbone of open_clip or timm"):
        load_routed(tmp_path / "nameless.safetensors")
    with pytest.raises(ValueError, match=r"expected the mixed layer model\.visual"):
        load_routed(tmp_path / "nameless.safetensors", nn.Linear(1, 1))


def test_layers_are_mlps_or_all_linear_ones_outside_of_packed_attention(frame):
    mlps = mixed_layers(frame.backbone, "mlp", frame.base)
    assert [name.split(".")[-1] for name in mlps] == ["c_fc", "c_proj"] * 2
    assert mixed_layers(frame.backbone, "linear", frame.base) == mlps
    with pytest.raises(ValueError, match="expected a trained linear layer of an MLP"):
        mixed_layers(frame.backbone, "mlp", ["model.visual.proj"])


def test_layers_that_read_tokens_first_are_refused():
    class Block(nn.Module):
        batch_first = False

        def __init__(self):
            super().__init__()
            self.mlp = nn.Linear(2, 2)

    whole = nn.Sequential(Block())
    with pytest.raises(ValueError, match="batch_first=False"):
        mixed_layers(whole, "mlp", ["0.mlp.weight"])


def test_an_expert_is_the_nearest_of_its_rank_and_sparse_where_wanted():
    torch.manual_seed(0)
    tau = {"layer.weight": torch.randn(6, 5, dtype=torch.float64), "layer.bias": torch.randn(6)}
    u, s, vh = torch.linalg.svd(tau["layer.weight"], full_matrices=False)
    found = experts_of(tau, ["layer"], 2)["layer"]
    assert torch.allclose(found.b.T @ found.a, u[:, :2] * s[:2] @ vh[:2], atol=1e-12)
    assert torch.equal(found.bias, tau["layer.bias"])
    sparse = experts_of(tau, ["layer"], None, density=0.2)["layer"]
    kept = tau["layer.weight"].abs() >= tau["layer.weight"].abs().flatten().topk(6).values[-1]
    assert torch.allclose(sparse.b.T @ sparse.a, tau["layer.weight"] * kept, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (Smile, {"rank": 0}),
        (Smile, {"gate_k": 64}),
        (Smile, {"top_k": 0}),
        (DAM, {"temperature": 0.0}),
        (Smile, {"targets": "attention"}),
        (GaussianPosterior, {"ridge": 0.0}),
    ],
)
def test_settings_out_of_range_are_refused(make, settings):
    with pytest.raises(ValueError, match="expected"):
        make(**settings)


def test_other_predictors_choose_no_task():
    assert Merged().choices is None
