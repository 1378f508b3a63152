import pytest
import torch
from support.routed import deployment, images_of, make_frame, mean_of, routed, task_end
from torch.nn import functional

from clmerge.deploy.routing import Mingle, PWEMoE, TaskOracle, TwinMerging, WEMoE
from clmerge.deploy.routing.mingle import effective_rank, outside, without
from clmerge.deploy.routing.routers import PreferenceGate
from clmerge.deploy.routing.wemoe import prefer


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    return make_frame(tmp_path_factory.mktemp("clip"))


def collected(routing, frame, tasks=(0, 1, 2)):
    ends = [task_end(frame, task) for task in tasks]
    for end in ends:
        routing.collect(end)
    return ends


def with_constant_gates(frame, images, gates):
    """Logits under the same gates for every image, at full rank."""
    model = routed(TaskOracle(rank=None), frame)
    return model.answer(images, torch.tensor(gates, dtype=torch.float64).expand(len(images), -1))


def still(model):
    """Remove what depends on the image from all gates, so that the biases of their last layers are left."""
    for name, parameter in model.layer_routers.named_parameters():
        if name.endswith("weight"):
            parameter.zero_()
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "routing", [WEMoE(steps=0, init=0.25), PWEMoE(steps=0, init=0.25), WEMoE(steps=0, init=0.25, shared_gate=True)]
)
def test_gates_without_weights_are_task_arithmetic(routing, frame):
    images = images_of(0)
    found = still(routed(routing, frame))(images)
    assert torch.allclose(found, with_constant_gates(frame, images, [0.25, 0.25, 0.25]), rtol=0, atol=1e-10)


def entropy(model, frame):
    with torch.no_grad():
        total = 0.0
        for task in range(3):
            end = task_end(frame, task)
            log_p = model(images_of(task).float())[:, end.classes].log_softmax(dim=1)
            total += float(-(log_p.exp() * log_p).sum(dim=1).mean())
        return total


@pytest.fixture
def narrow(frame):
    """The network in float32, as gates are trained."""
    base = {name: tensor.float() for name, tensor in frame.base.items()}
    backbone = frame.backbone.float()
    yield type(frame)(backbone, frame.head.float(), base, frame.device)
    frame.backbone.double()
    frame.head.double()


def narrow_end(frame, task):
    end = task_end(frame, task)
    images = [(images.float(), labels) for images, labels in end.images()]
    tau = {name: tensor.float() for name, tensor in end.tau.items()}
    return type(end)(end.task, end.classes, tau, frame, lambda: iter(images), end.seed)


def narrow_deployment(frame, ends):
    found = deployment(frame, ends)

    def rounds():
        for batches in found.batches():
            yield [type(batch)(batch.images.float(), batch.labels, batch.task, batch.positions) for batch in batches]

    return type(found)(**{**vars(found), "batches": rounds})


def test_training_wemoe_lowers_the_entropy_and_is_a_function_of_the_seed(narrow):
    models = []
    for steps, seed in ((0, 0), (30, 0), (30, 0), (30, 1)):
        routing = WEMoE(steps=steps, lr=1e-2, seed=seed)
        ends = [narrow_end(narrow, task) for task in range(3)]
        for end in ends:
            routing.collect(end)
        models.append(routing.build(narrow_deployment(narrow, ends)))
    losses = [entropy(model, narrow) for model in models]
    assert losses[1] < losses[0]
    assert losses[1] == losses[2] != losses[3]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in models[1].parameters())


def test_a_preference_for_a_task_lowers_its_loss(narrow):
    routing = PWEMoE(steps=60, lr=3e-2)
    ends = [narrow_end(narrow, task) for task in range(3)]
    for end in ends:
        routing.collect(end)
    model = routing.build(narrow_deployment(narrow, ends))
    images, labels = next(ends[0].images())
    own = torch.tensor(ends[0].classes)

    def loss(shares):
        prefer(model, torch.tensor(shares))
        with torch.no_grad():
            return float(functional.cross_entropy(model(images)[:, own], torch.searchsorted(own, labels)))

    assert loss([0.98, 0.01, 0.01]) < loss([0.01, 0.01, 0.98])


@torch.no_grad()
def test_the_preference_is_that_of_the_tasks_so_far(frame):
    routing = PWEMoE(steps=0, preference=[1.0, 3.0, 4.0])
    model = routed(routing, frame, (0, 1))
    (first, *_) = [gate for gate in model.layer_routers if isinstance(gate, PreferenceGate)]
    assert first.preference.tolist() == [0.25, 0.75]
    with pytest.raises(ValueError, match="expected one entry for each of the 4 tasks in preference of PWEMoE"):
        routing.check_tasks(4)


@torch.no_grad()
def test_a_twin_at_full_rank_and_the_gate_of_one_task_is_that_expert(frame):
    routing = TwinMerging(rank=None, steps=0, per_class=2)
    ends = collected(routing, frame)
    for end in ends:
        expert = {name: base + end.tau[name] for name, base in frame.base.items()}
        merged = mean_of(frame, ends)
        mixed = {name: expert[name] if ".mlp." in name else tensor for name, tensor in merged.items()}
        model = routing.build(deployment(frame, ends)).double()
        gates = functional.one_hot(torch.tensor([end.task] * 4), 3).double()
        images = images_of(end.task)
        expected = frame.head(frame.model(mixed)(images))
        assert torch.allclose(model.answer(images, gates), expected, rtol=0, atol=1e-10)
        nothing = model.answer(images, torch.zeros(4, 3, dtype=torch.float64))
        assert torch.allclose(nothing, frame.head(frame.model(merged)(images)), rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_router_of_twins_learns_the_tasks_from_what_was_kept(frame):
    routing = TwinMerging(rank=2, steps=200, per_class=64, ridge=0.01, lr=1e-2)
    ends = collected(routing, frame)
    model = routing.build(deployment(frame, ends)).double()
    for task in range(3):
        model(images_of(task))
        assert model.choices().argmax(dim=1).tolist() == [task] * 4


def test_the_effective_rank_and_what_is_outside_of_it():
    assert effective_rank(torch.tensor([4.0, 2.0, 1.0, 1.0])) == 3  # exp(entropy) = 3.3636
    assert effective_rank(torch.zeros(3)) == 0
    torch.manual_seed(0)
    tau, merged = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    u, values, vh = torch.linalg.svd(merged)
    k = effective_rank(values)
    inside = u.T @ outside(tau, merged) @ vh.T
    assert torch.allclose(inside[:k, :k], torch.zeros(k, k, dtype=torch.float64), atol=1e-12)
    expected = u.T @ tau @ vh.T
    expected[:k, :k] = 0.0
    assert torch.allclose(inside, expected, atol=1e-12)


def test_without_directions():
    basis = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    vector = torch.arange(6, dtype=torch.float64)
    assert torch.allclose(basis.T @ without(vector, basis, torch.ones(2, dtype=torch.float64)), torch.zeros(2).double())
    assert torch.equal(without(vector, basis, torch.zeros(2, dtype=torch.float64)), vector)


@torch.no_grad()
def test_one_task_is_its_expert_with_a_gate_of_one(frame):
    images = images_of(0)
    found = routed(Mingle(rank=None, steps=0), frame, (0,))
    expected = routed(TaskOracle(rank=None), frame, (0,)).answer(images, torch.ones(4, 1, dtype=torch.float64))
    assert torch.allclose(found(images), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("relaxation", [0.0, 1.0])
def test_steps_leave_what_earlier_tasks_read_and_their_rows_alone(narrow, relaxation):
    routing = Mingle(rank=4, steps=8, lr=0.05, directions=2, relaxation=relaxation)
    routing.collect(narrow_end(narrow, 0))
    before = {layer: row.clone() for layer, row in routing.weights[0].items()}
    first = {layer: row.clone() for layer, row in routing.biases[0].items()}
    assert any(row.any() for row in before.values())  # the first task has learned something
    routing.collect(narrow_end(narrow, 1))
    assert all(torch.equal(routing.weights[0][layer], row) for layer, row in before.items())
    assert all(torch.equal(routing.biases[0][layer], row) for layer, row in first.items())
    along = [float((routing.weights[1][layer] @ routing.read[0][layer]).abs().max()) for layer in before]
    assert max(along) < 1e-6 if not relaxation else max(along) < 0.05
    for layer in before:
        both = torch.cat([routing.read[0][layer], routing.read[1][layer]], dim=1)
        assert torch.allclose(both.T @ both, torch.eye(both.shape[1]), atol=1e-5)


def test_the_second_expert_lies_outside_of_the_first(frame):
    routing = Mingle(rank=None, steps=0)
    collected(routing, frame, (0, 1))
    for layer, one in routing.experts[0].items():
        other = routing.experts[1][layer]
        expected = outside(task_end(frame, 1).tau[f"{layer}.weight"], one.b.T @ one.a)
        assert torch.allclose(other.b.T @ other.a, expected, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (WEMoE, {"density": 0.0}),
        (WEMoE, {"steps": -1}),
        (WEMoE, {"lr": 0.0}),
        (PWEMoE, {"preference": [1.0, 0.0]}),
        (TwinMerging, {"per_class": 0}),
        (Mingle, {"per_class": 0}),
        (Mingle, {"relaxation": -1.0}),
    ],
)
def test_settings_out_of_range_are_refused(make, settings):
    with pytest.raises(ValueError, match="expected"):
        make(**settings)


def test_a_loss_that_is_not_finite_is_an_error(frame):
    routing = WEMoE(steps=3)
    ends = collected(routing, frame)
    broken = deployment(frame, ends)
    images = images_of(0) * torch.nan

    def rounds():
        for batches in broken.batches():
            yield [type(batch)(images, batch.labels, batch.task, batch.positions) for batch in batches]

    with pytest.raises(ValueError, match="expected a finite loss of the gates, got nan at step 1"):
        routing.build(type(broken)(**{**vars(broken), "batches": rounds}))
