"""PEFT's LoRA layers are merged as the dense weights they compute with; without PEFT, on layers of its structure."""

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from support.tiny import ForeignModule, toy_loader
from torch import nn

from clmerge.callbacks import MergeCallback
from clmerge.merging import MagMax, TaskArithmetic
from clmerge.weights.parametrization import dense_weights, folded, merged_names, parametrized
from clmerge.weights.swap import swapped


class PeftLike(nn.Module):
    """What PEFT (0.21) makes of a linear layer or a convolution, in little."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")

    def __init__(self, base_layer, rank=2, scaling=2.0):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        if isinstance(base_layer, nn.Conv2d):
            own = base_layer.kernel_size, base_layer.stride, base_layer.padding
            a = nn.Conv2d(base_layer.in_channels, rank, *own, bias=False)
            b = nn.Conv2d(rank, base_layer.out_channels, 1, bias=False)
        else:
            a = nn.Linear(base_layer.in_features, rank, bias=False)
            b = nn.Linear(rank, base_layer.out_features, bias=False)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": a}), nn.ModuleDict({"default": b})
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.scaling, self.use_dora, self.lora_variant = {"default": scaling}, {}, {}
        self.active_adapters, self.disable_adapters, self.merged = ["default"], False, False
        nn.init.zeros_(self.lora_B["default"].weight)

    def get_delta_weight(self, adapter):
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return torch.einsum("or,ri...->oi...", b.flatten(1), a) * self.scaling[adapter]

    def forward(self, x):
        return self.base_layer(x) + self.scaling["default"] * self.lora_B["default"](self.lora_A["default"](x))


def peft_like(net):
    net[0], net[3] = PeftLike(net[0]), PeftLike(net[3])
    return net


def real_peft(net):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(net, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "3"]))


class Pictures(nn.Sequential):
    """A convolution of 2 x 2 pixels, and what comes after it."""

    def forward(self, x):
        features = self[0](x.reshape(-1, 1, 2, 2)).mean(dim=(2, 3))
        return self[3](self[2](features))


@pytest.fixture(params=[(kind, tune) for kind in ("linear", "convolution") for tune in (peft_like, real_peft)])
def model(request):
    kind, tune = request.param
    torch.manual_seed(0)
    model = ForeignModule(lr=0.3)
    if kind == "convolution":
        model.net = Pictures(nn.Conv2d(1, 6, 3, padding=1), *model.net[1:])
    model.net = tune(model.net)
    return model


def layers(model):
    return [part for part in model.modules() if hasattr(part, "lora_A") and hasattr(part, "base_layer")]


def dense(model):
    return [(part.base_layer.weight + part.get_delta_weight("default")).detach().clone() for part in layers(model)]


def fit(model, merge, task):
    Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[merge],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, toy_loader(task))


def outputs(model):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model.net(x)


@pytest.mark.parametrize("start_policy", ["previous", "base", "merged"])
def test_the_merge_is_that_of_dense_weights(model, start_policy):
    base = dense(model)
    merge = MergeCallback(TaskArithmetic(scale=0.4), start_policy=start_policy)
    left = []
    for task in range(3):
        fit(model, merge, task)
        left.append(dense(model))
    names = [name for name in merge.merged_state() if name.endswith("weight")]
    assert [name.removeprefix("net.").removeprefix("base_model.model.") for name in names] == ["0.weight", "3.weight"]
    expected = [start + 0.4 * sum(theta[i] - start for theta in left) for i, start in enumerate(base)]
    for name, weight in zip(names, expected, strict=True):
        torch.testing.assert_close(merge.merged_state()[name], weight, rtol=1e-4, atol=1e-5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with merge.merged(model):
        for found, weight in zip(dense(model), expected, strict=True):
            torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_previous_leaves_base_and_factors_to_peft(model):
    """PEFT's own adapter files belong to the base that they were trained on."""
    base = [part.base_layer.weight.detach().clone() for part in layers(model)]
    merge = MergeCallback(MagMax())
    for task in range(2):
        fit(model, merge, task)
    assert all(torch.equal(part.base_layer.weight, start) for part, start in zip(layers(model), base, strict=True))


def test_folded_layers_compute_the_same(model):
    fit(model, MergeCallback(MagMax()), 0)
    expected, own = outputs(model), layers(model)
    with folded(model):
        assert not layers(model)
        torch.testing.assert_close(outputs(model), expected)
    assert all(a is b for a, b in zip(layers(model), own, strict=True))


def _dora(layer):
    layer.use_dora = {"default": True}


def _merged(layer):
    layer.merged = True


def _biased(layer):
    layer.lora_B["default"] = nn.Linear(2, 6)


def _quantized(layer):
    layer.base_layer.weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.int8), requires_grad=False)


def _grouped(layer):
    layer.base_layer = nn.Conv2d(4, 6, 1, groups=2)


def _attention(layer):
    layer.base_layer = nn.MultiheadAttention(4, 1)


def _ia3(layer):
    del layer.lora_A


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_dora, "a variant of LoRA"),
        (_merged, "merged into its weight now"),
        (_biased, "a bias of its factors"),
        (_quantized, "quantized"),
        (_grouped, "convolution has groups"),
        (_attention, "wraps MultiheadAttention"),
        (_ia3, "not LoRA"),
    ],
)
def test_what_is_no_product_is_refused_before_training_with_the_way_out(change, reason):
    model = ForeignModule()
    model.net = peft_like(model.net)
    change(model.net[0])
    with pytest.raises(RuntimeError, match=rf"got PeftLike at 'net\.0', .*{reason}.*add_lora instead.*clmerge merge"):
        parametrized(model)


@pytest.mark.parametrize("name", ["lora_A", "lora_a", "lora_up", "hada_w1_a", "ia3_l"])
def test_factors_of_other_libraries_are_refused(name):
    model = ForeignModule()
    model.net[0].register_parameter(name, nn.Parameter(torch.zeros(2, 4)))
    with pytest.raises(ValueError, match=rf"factors .*'net\.0\.{name}'.*add_lora or PEFT's LoRA.*exclude="):
        fit(model, MergeCallback(MagMax()), 0)
    assert merged_names(model, exclude=["*" + name])


def test_modules_to_save_and_embeddings_of_peft_are_merged_too():
    peft = pytest.importorskip("peft")
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    config = peft.LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["2"], init_lora_weights=False)
    tuned = peft.get_peft_model(copy.deepcopy(net), config)
    names = merged_names(tuned)
    assert [name for name in names if "modules_to_save" in name], names
    values = dense_weights(tuned, names)
    embedding = next(name for name in names if name.endswith("0.weight") and "save" not in name)
    layer = tuned.base_model.model[0]
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(values[embedding], expected)
    from clmerge.weights.parametrization import state_of

    tau = {name: torch.randn_like(value) for name, value in values.items()}
    base = {name: value.detach().clone() for name, value in values.items()}
    with swapped(tuned, state_of(tuned, base, tau)):
        found = tuned(torch.tensor([3]))
        plain = (base[embedding] + tau[embedding])[3]
        torch.testing.assert_close(layer(torch.tensor([3]))[0], plain)
    assert found.shape == (1, 3)
