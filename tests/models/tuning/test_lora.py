import copy

import pytest
import torch
from support.tiny import tiny_clip
from support.towers import TOWERS, clip_tower, images, shake, timm_tower
from torch import nn
from torch.func import functional_call, jvp
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from clmerge.merging import sum_adapters, truncate_adapter
from clmerge.models import LoRA, OpenClip, Timm
from clmerge.models.tuning.lora import add_lora, get_adapter, set_adapter
from clmerge.models.tuning.low_rank import LoRALinear, LoRAMultiheadAttention
from clmerge.weights.factored import product
from clmerge.weights.parametrization import folded, merged_parameters, read_task_vector, renew, state_of
from clmerge.weights.swap import swapped


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clip")


EVERY_TOWER = pytest.mark.parametrize("tower", TOWERS)


@EVERY_TOWER
def test_nothing_changes_at_first_and_all_factors_are_trained(folder, tower):
    model, size = tower(folder)
    x, names = images(size), set(model.state_dict())
    with torch.no_grad():
        expected = model(x)
    model.requires_grad_(False)
    chosen = add_lora(model, r"\.(attn|mlp)\.", rank=2)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert set(model.state_dict()) > names, "dense weights keep their names"
    assert list(merged_parameters(model)) == sorted(chosen, key=list(model.state_dict()).index)
    shake(model)
    model.train()
    model(x).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {name for name in model.state_dict() if "lora_" in name}


@EVERY_TOWER
def test_a_folded_model_computes_the_same_with_ordinary_layers(folder, tower):
    model, size = tower(folder)
    model.double()
    keys, kinds = list(model.state_dict()), [type(part) for part in model.modules()]
    add_lora(model, r"\.(attn|mlp)\.", rank=2, alpha=5)
    shake(model)
    x = images(size, torch.float64)
    with torch.no_grad():
        expected = model(x)
        with folded(model):
            assert list(model.state_dict()) == keys
            assert [type(part) for part in model.modules()] == kinds
            torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(model(x), expected)
        assert any(isinstance(part, LoRALinear) for part in model.modules())


@EVERY_TOWER
def test_a_task_vector_is_the_product_and_comes_back_as_weights(folder, tower):
    model, size = tower(folder)
    add_lora(model, "attn", rank=2, alpha=3)
    base = {name: tensor.detach().clone() for name, tensor in merged_parameters(model, ["*attn*"]).items()}
    base = {name: tensor for name, tensor in base.items() if tensor.ndim == 2}
    shake(model)
    tau = read_task_vector(model, base)
    for path, part in model.named_modules():
        for own in getattr(part, "lora_weights", ()):
            a, b = part.factors(own)
            expected = 1.5 * torch.cat(list(b @ a)) if a.ndim == 3 else 1.5 * b @ a
            torch.testing.assert_close(tau[f"{path}.{own}"], expected.detach(), rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        trained = model(images(size))
        with swapped(model, state_of(model, base, tau)):
            assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
            torch.testing.assert_close(model(images(size)), trained, rtol=1e-4, atol=1e-5)
            again = read_task_vector(model, base)
        assert torch.equal(model(images(size)), trained)
        for name, tensor in again.items():
            torch.testing.assert_close(tensor, tau[name], rtol=0, atol=1e-6)


def test_a_linear_layer_by_hand():
    layer = nn.Sequential(nn.Linear(2, 2, bias=False))
    add_lora(layer, "weight", rank=1, alpha=2)
    with torch.no_grad():
        layer[0]._parameters["weight"].copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        layer[0].lora_A_weight.copy_(torch.tensor([[1.0, -1.0]]))
        layer[0].lora_B_weight.copy_(torch.tensor([[3.0], [0.5]]))
    # B A = [[3, -3], [0.5, -0.5]], twice; plus the identity
    assert layer[0].weight.tolist() == [[7.0, -6.0], [1.0, 0.0]]
    assert layer(torch.tensor([[1.0, 2.0]])).tolist() == [[7.0 - 12.0, 1.0]]


def test_query_key_and_value_have_a_product_of_full_rank_each():
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    assert add_lora(attention, "attn", rank=2) == ["attn.in_proj_weight", "attn.out_proj.weight"]
    shake(attention)
    tau = product(*attention["attn"].factors("in_proj_weight"), 1.0)
    assert tau.shape == (24, 8)
    assert [int(torch.linalg.matrix_rank(part)) for part in tau.chunk(3)] == [2, 2, 2]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"batch_first": True, "bias": False},
        {"kdim": 6, "vdim": 4, "add_bias_kv": True},
        {"add_zero_attn": True},
    ],
)
@pytest.mark.parametrize("targets", ["proj", "out_proj", "(in|q|v)_proj"])
def test_attention_in_all_its_forms(options, targets):
    torch.manual_seed(0)
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, **options)}).double().eval()
    plain = copy.deepcopy(attention)
    add_lora(attention, targets, rank=2)
    assert isinstance(attention["attn"], LoRAMultiheadAttention) == (targets != "out_proj")
    shake(attention)
    with folded(attention):
        plain.load_state_dict(attention.state_dict())
    generator = torch.Generator().manual_seed(0)
    widths = (8, options.get("kdim", 8), options.get("vdim", 8))
    q, k, v = (torch.randn(5, 3, width, generator=generator, dtype=torch.float64) for width in widths)
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[0, 1:] = True
    for arguments in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        if not options.get("batch_first"):
            arguments["attn_mask"] = mask
        found, expected = attention["attn"](q, k, v, **arguments), plain["attn"](q, k, v, **arguments)
        torch.testing.assert_close(found[0], expected[0])
        assert (found[1] is None) == (expected[1] is None)
        if found[1] is not None:
            torch.testing.assert_close(found[1], expected[1])
    if not options.get("kdim"):
        torch.testing.assert_close(attention["attn"](q[0], k[0], v[0])[0], plain["attn"](q[0], k[0], v[0])[0])


def test_a_task_starts_from_what_was_computed_with_fresh_factors(folder):
    model, size = clip_tower(folder)
    add_lora(model, "attn", rank=2)
    shake(model)
    with torch.no_grad():
        expected = model(images(size))
        renew(model, seed=0, task=1)
        torch.testing.assert_close(model(images(size)), expected, rtol=1e-4, atol=1e-5)
    drawn = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    assert all(bool(p.any()) == ("lora_A" in name) for name, p in drawn.items())
    assert all(p.abs().max() <= 8**-0.5 for p in drawn.values())

    def again(seed, task):
        renew(model, seed=seed, task=task)
        return {name: p for name, p in model.named_parameters() if name in drawn}

    assert all(torch.equal(again(0, 1)[name], p) for name, p in drawn.items())
    assert not any(torch.equal(again(0, 2)[name], p) for name, p in drawn.items() if "lora_A" in name)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, when jvp is first used
@pytest.mark.parametrize("tower", [clip_tower, timm_tower])
def test_it_can_be_copied_differentiated_and_called_with_other_weights(folder, tower):
    model, size = tower(folder)
    add_lora(model, r"\.(attn|mlp)\.", rank=2)
    shake(model)
    x = images(size)
    model.train()
    expected = model(x)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), expected)
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), model.parameters(), strict=True))

    factors = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    steps = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) for name, p in factors.items()}
    model.double()
    factors, steps = ({name: t.double() for name, t in d.items()} for d in (factors, steps))
    with sdpa_kernel(SDPBackend.MATH):
        value, change = jvp(lambda p: functional_call(model, p, (x.double(),)), (factors,), (steps,))
        ahead, behind = (
            functional_call(model, {n: t + e * steps[n] for n, t in factors.items()}, (x.double(),))
            for e in (1e-5, -1e-5)
        )
    torch.testing.assert_close(value.float(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(change, (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-7)


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.attn(x, x, x, need_weights=False)[0])


def test_it_compiles_without_a_break():
    block, x = _Block(), torch.randn(3, 2, 8)
    add_lora(block, ".", rank=2)
    shake(block)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))
    compiled(x).square().sum().backward()
    assert all(p.grad is not None for name, p in block.named_parameters() if "lora_" in name)


def test_mixed_precision_trains_and_dense_weights_stay_exact(folder):
    model, size = clip_tower(folder)
    add_lora(model, "attn", rank=2)
    shake(model)
    model.train()
    with torch.no_grad():
        expected = model(images(size))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images(size))
        name = next(n for n in merged_parameters(model) if "in_proj_weight" in n)
        inside = merged_parameters(model)[name]
    assert inside.dtype == torch.float32
    assert torch.equal(inside, merged_parameters(model)[name])
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    found.float().square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_hooks_and_modes_survive():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    add_lora(net, "0", rank=1)
    assert not net[0].training
    net(torch.zeros(1, 2))
    with folded(net):
        net(torch.zeros(1, 2))
    assert calls == [1, 1]


# Targets ----------------------------------------------------------------------------------------------------


def test_the_tuning_stays_in_the_image_tower(folder):
    backbone = OpenClip(tiny_clip(folder))
    names = LoRA(rank=2).prepare(backbone)
    assert len(names) == 2 * 4
    assert all(name.startswith("visual.transformer.resblocks.") for name in names)
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_patterns_do_not_reach_the_patch_embedding_by_accident():
    def linear_patches():
        model = Timm("test_vit", image_size=32)
        model.model.patch_embed.proj = nn.Linear(4, 4)
        return model

    assert not any("patch" in name for name in LoRA(targets="proj").prepare(linear_patches()))
    assert "patch_embed.proj.weight" in LoRA(targets="patch_embed|attn").prepare(linear_patches())
    assert LoRA(targets=r"attn\.qkv").prepare(Timm("test_vit"))[0] == "blocks.0.attn.qkv.weight"


class _Scaled(nn.Linear):
    def forward(self, x):
        return 2 * functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "nope"}, r"match a linear map of Sequential, got 'nope'; its linear maps are '0\.weight'"),
        ({"targets": "^1"}, "got '\\^1'"),
        ({"targets": "^2"}, "got '\\^2'"),
        ({"targets": "("}, r"regular expression for targets, got '\('"),
        ({"targets": "0", "rank": 0}, "rank of 1 or more, got 0"),
        ({"targets": "[34]"}, r"no two modules share, got \['3\.weight', '4\.weight'\]"),
    ],
)
def test_what_cannot_have_factors_is_refused(options, message):
    net = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 1, 1), _Scaled(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    net[4].weight = net[3].weight
    with pytest.raises(ValueError, match=message):
        add_lora(net, **options)
    assert not any("lora" in name for name in net.state_dict())


def test_a_layer_gets_factors_once():
    net = nn.Sequential(nn.Linear(2, 2))
    add_lora(net, "0")
    with pytest.raises(ValueError, match="its linear maps are none"):
        add_lora(net, "0")


def test_a_merged_adapter_is_put_into_a_model(folder):
    adapters, taus = [], []
    for seed in (1, 2):
        model, size = clip_tower(folder)
        add_lora(model, r"\.(attn|mlp)\.", rank=2, alpha=4)
        base = {name: t.detach().clone() for name, t in merged_parameters(model, ["*.attn.*weight"]).items()}
        shake(model, seed=seed)
        adapters.append(get_adapter(model))
        taus.append(read_task_vector(model, base))
    fresh, size = clip_tower(folder)
    merged = sum_adapters(adapters)
    assert set_adapter(fresh, merged) == list(merged)
    for name, tensor in read_task_vector(fresh, base).items():
        torch.testing.assert_close(tensor, taus[0][name] + taus[1][name])
    assert torch.isfinite(fresh(images(size))).all()
    small, _ = clip_tower(folder)
    set_adapter(small, truncate_adapter(merged, 2))
    assert next(p for n, p in small.named_parameters() if "lora_A_in_proj_weight" in n).shape == (3, 2, 8)
    with pytest.raises(ValueError, match=r"in_proj_weight' of shape \(24, 8\).*got no such linear map"):
        set_adapter(small, merged)
