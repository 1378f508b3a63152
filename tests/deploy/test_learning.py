"""The gradients that a model gives to a rule that learns, and the classifier's losses on adaptation data."""

from itertools import islice

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from clmerge.callbacks import MergeCallback
from clmerge.deploy.adapting import adaptation_losses, outputs
from clmerge.deploy.learning import Request, learning
from clmerge.merging import AdaMerging, Agreement, CrossEntropy, Entropy, TaskArithmetic
from clmerge.models import Backbone, LinearHead, add_lora
from clmerge.streams import AdaptationData, ClassIncremental, SklearnDigits, StreamDataModule
from clmerge.streams.splits import derived_seed
from clmerge.training.module import ContinualClassifier
from clmerge.weights.parametrization import merged_parameters

IMAGES = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))


def steps_of(*losses):
    def steps(model, request):
        while True:
            yield losses

    return steps


def squares(model):
    return model(IMAGES).square().mean()


def absolutes(model):
    return model(IMAGES[:3]).abs().sum()


def opened(model, losses, base=None):
    base = (
        {name: tensor.detach().clone() for name, tensor in merged_parameters(model).items()} if base is None else base
    )
    return base, learning(model, base, losses, buffers={}, origin="the base")


def vector_for(base, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}


def test_the_gradient_is_that_of_the_losses_at_theta_zero_plus_the_vector():
    model = network()
    base, context = opened(model, steps_of(squares, absolutes))
    vector = vector_for(base)
    with context as gradients:
        loss, slopes = gradients(Entropy(), [0], seed=0, expert=lambda task: {})(dict(vector))
    twin = network().eval()
    weights = {name: (base[name] + vector[name]).requires_grad_() for name in base}
    out = functional_call(twin, weights, IMAGES)
    whole = out.square().mean() + out[:3].abs().sum()
    wanted = torch.autograd.grad(whole, list(weights.values()))
    assert loss == pytest.approx(whole.item(), rel=1e-6)
    for slope, other in zip(slopes.values(), wanted, strict=True):
        torch.testing.assert_close(slope, other)


def test_lora_learns_by_dense_weights():
    model = network()
    dense_base = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    add_lora(model, rank=2, targets="0|3")
    base = {name: dense_base[name] for name in merged_parameters(model)}
    assert "0.weight" in base
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, context = opened(model, steps_of(squares), base)
    vector = vector_for(base)
    with context as gradients:
        _, slopes = gradients(Entropy(), [0], seed=0, expert=lambda task: {})(dict(vector))
    twin = network().eval()
    weights = {name: (base[name] + vector[name]).requires_grad_() for name in base}
    whole = functional_call(twin, {**dense_base, **weights}, IMAGES).square().mean()
    for name, other in zip(base, torch.autograd.grad(whole, list(weights.values())), strict=True):
        torch.testing.assert_close(slopes[name], other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(fails):
    model = network()
    model[3].bias.requires_grad_(False)
    own = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def broken(model):
        raise RuntimeError("no images")

    base, context = opened(model, steps_of(broken if fails else squares))

    def compute():
        with context as gradients:
            assert not model.training
            gradients(Entropy(), [0], seed=0, expert=lambda task: {})(vector_for(base))

    if fails:
        with pytest.raises(RuntimeError, match="no images"):
            compute()
    else:
        compute()
    assert model.training
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == own
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, True, False]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_expert_is_in_the_model_for_a_block():
    model = network()
    seen = {}

    def steps(model, request):
        with request.expert(3):
            seen["expert"] = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        seen["after"] = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        seen["request"] = request
        while True:
            yield [squares]

    base, context = opened(model, steps)
    with context as gradients:
        gradients(Entropy(), [3], seed=5, expert=lambda task: {n: t * task for n, t in vector_for(base).items()})(
            vector_for(base)
        )
    assert seen["request"].seed == 5
    for name, tensor in vector_for(base).items():
        torch.testing.assert_close(seen["expert"][name], base[name] + 3 * tensor)


def test_sharded_weights_are_refused(monkeypatch):
    model = network()
    monkeypatch.setattr("clmerge.deploy.learning.DTensor", nn.Parameter)
    _, context = opened(model, steps_of(squares))
    with pytest.raises(ValueError, match=r"whole weights to learn coefficients with, got '0.weight' in shards"):
        context.__enter__()


class Foreign(LightningModule):
    """Somebody's module that learns to put out a target."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, images):
        return self.layer(images)


def test_a_callback_in_another_project_learns_from_its_own_losses():
    def losses(model, request):
        while True:
            yield [lambda module: functional.mse_loss(module(IMAGES), torch.zeros(7, 3))]

    model = Foreign()
    merge = MergeCallback([TaskArithmetic(), AdaMerging(steps=20, lr=0.02)], losses=losses)
    merge.take_base(model)
    for seed in range(2):
        merge.fold(vector_for(merge.base, seed), model)
    found = {}
    for name in merge.mergers:
        with merge.merged(model, name), torch.no_grad():
            found[name] = functional.mse_loss(model(IMAGES), torch.zeros(7, 3)).item()
    assert found["adamerging"] < found["task_arithmetic"]
    with pytest.raises(ValueError, match="expected losses= for merger 'adamerging', which learns"):
        MergeCallback(AdaMerging())


class Pixels(Backbone):
    """Two numbers of an image are its features."""

    def __init__(self):
        super().__init__()
        self.feature_dim = 2
        self.model = nn.Linear(3, 2)
        self.train_transform = self.eval_transform = Corner()

    def forward(self, images):
        return self.model(images)


class Corner:
    def __call__(self, image):
        return torch.tensor([float(sum(image.getpixel((i, i)))) / 100 for i in (2, 3, 4)])


@pytest.fixture(scope="module")
def classified():
    torch.manual_seed(0)
    module = ContinualClassifier(Pixels(), LinearHead())
    data = StreamDataModule(32)
    data.setup_stream(ClassIncremental(SklearnDigits(), val_fraction=0.1), Corner(), Corner())
    module.begin_stream(10)
    for task in data.stream.tasks:
        module.begin_task(task.classes)
    return module.eval(), data


def first_step(classified, objective, adaptation, tasks, expert=None):
    module, data = classified
    base = {name: tensor.detach() for name, tensor in module.backbone.named_parameters(prefix="backbone")}
    seen = {}

    def steps(model, request):
        for losses in adaptation_losses(adaptation, data, seed=4)(model, request):
            with torch.no_grad():
                seen.setdefault("values", [float(loss(model)) for loss in losses])
            yield losses

    with learning(module, base, steps, buffers={}, origin="the base") as gradients:
        zero = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
        gradients(objective, tasks, seed=0, expert=expert or (lambda task: zero))(zero)
    return seen["values"]


@pytest.mark.parametrize("heads", ["task", "seen"])
def test_a_step_is_a_batch_of_every_task(classified, heads):
    module, data = classified
    adaptation = AdaptationData(labels=True, batch_size=5)
    values = first_step(classified, CrossEntropy(heads=heads), adaptation, [2, 0])
    batches = islice(adaptation.batches(data, [2, 0], seed=derived_seed(4, "learning", 0)), 2)
    for value, batch in zip(values, batches, strict=True):
        own = sorted(data.stream.tasks[batch.task].classes)
        columns = own if heads == "task" else sorted({*data.stream.tasks[0].classes, *data.stream.tasks[2].classes})
        with torch.no_grad():
            logits = module(batch.images)[:, columns]
        labels = torch.tensor([columns.index(label) for label in batch.labels.tolist()])
        assert value == pytest.approx(functional.cross_entropy(logits, labels).item(), abs=1e-6)


def test_experts_are_asked_about_the_images_of_their_own_task(classified):
    module, data = classified
    adaptation = AdaptationData("buffer", per_class=4, batch_size=3)

    def expert(task):
        return {
            f"backbone.model.{n}": torch.full_like(t, 0.1 * (task + 1))
            for n, t in module.backbone.model.named_parameters()
        }

    asked = []

    class Spy(Agreement):
        def __call__(self, model, given):
            asked.append(given)
            return super().__call__(model, given)

    first_step(classified, Spy(), adaptation, [0, 1], expert)
    batches = list(islice(adaptation.batches(data, [0, 1], seed=derived_seed(4, "learning", 0)), 2))
    for given, batch in zip(asked, batches, strict=False):
        with torch.no_grad():
            moved = {
                name: p + expert(batch.task)[f"backbone.model.{name.removeprefix('backbone.model.')}"]
                for name, p in module.named_parameters()
                if name.startswith("backbone.model.")
            }
            found = functional_call(
                module.backbone, {n.removeprefix("backbone."): t for n, t in moved.items()}, batch.images
            )
        torch.testing.assert_close(given.expert.features, found)
        assert given.labels is None


def test_labels_stay_out_of_sight_where_they_are_not_read(classified):
    module, data = classified
    request = Request(Entropy(), [0], 0, lambda task: None)
    seen = []

    class Spy(Entropy):
        def __call__(self, model, given):
            seen.append(given.labels)
            return super().__call__(model, given)

    request = Request(Spy(), [0], 0, request.expert)
    (loss,) = next(adaptation_losses(AdaptationData(labels=True), data, seed=0)(module, request))
    loss(module)
    assert seen == [None]
    assert outputs(module, torch.zeros(2, 3)).features.shape == (2, 2)
