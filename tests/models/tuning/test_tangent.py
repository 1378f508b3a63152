"""The tangent model against what defines it: derivatives of the plain model by finite differences in float64."""

from copy import deepcopy

import open_clip
import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from clmerge.models.tuning.tangent import TangentModule
from clmerge.weights.parametrization import merged_parameters, read_task_vector, renew, state_of
from clmerge.weights.swap import swapped


def clip_vit():
    return open_clip.transformer.VisionTransformer(
        image_size=8, patch_size=4, width=8, layers=2, heads=2, mlp_ratio=2.0, output_dim=6
    )


def timm_vit():
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        embed_dim=8,
        num_heads=2,
        depth=2,
        num_classes=0,
        drop_rate=0.1,
        attn_drop_rate=0.1,
        drop_path_rate=0.2,
    )


def convnet():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(inplace=True), nn.Flatten(), nn.Dropout(0.3), nn.Linear(144, 6)
    )


MODELS = {"open_clip": clip_vit, "timm": timm_vit, "convnet": convnet}


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype), torch.randn(4, 3, 8, 8, dtype=dtype)


def random_tau(module, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale
        for name, p in module.tangent.named_parameters()
    }


def set_tau(module, tau):
    module.tangent.load_state_dict(tau)


def at(model, theta, x, seed=1):
    torch.manual_seed(seed)  # dropout
    return functional_call(deepcopy(model), theta, (x,))


def derivative(model, tau, x, h=1e-6):
    theta = dict(model.named_parameters())
    with torch.no_grad():
        ahead = at(model, {n: p + h * tau.get(n, torch.zeros(())) for n, p in theta.items()}, x)
        behind = at(model, {n: p - h * tau.get(n, torch.zeros(())) for n, p in theta.items()}, x)
    return (ahead - behind) / (2 * h)


def forward(module, x, seed=1):
    torch.manual_seed(seed)
    return module(x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_output_is_the_first_order_expansion(name, training):
    model, x = build(name)
    model.train(training)
    linear = TangentModule(deepcopy(model)).train(training)
    torch.testing.assert_close(forward(linear, x), at(model, {}, x))
    tau = random_tau(linear, 1)
    set_tau(linear, tau)
    expected = at(model, {}, x) + derivative(model, tau, x)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(forward(linear, x), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_composition_is_linear(name):
    """The output at a sum of task vectors is the base's output plus the sum of their increments."""
    model, x = build(name)
    linear = TangentModule(model).eval()
    start = linear(x)
    vectors = [random_tau(linear, seed) for seed in range(3)]
    increments = []
    for tau in vectors:
        set_tau(linear, tau)
        increments.append(linear(x) - start)
    weights = (0.3, -2.0, 1.0)
    set_tau(linear, {n: sum(w * tau[n] for w, tau in zip(weights, vectors, strict=True)) for n in vectors[0]})
    expected = start + sum(w * change for w, change in zip(weights, increments, strict=True))
    torch.testing.assert_close(linear(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_at_zero_is_that_of_the_weights(name, checkpointing):
    model, x = build(name)
    linear = TangentModule(deepcopy(model), checkpointing=checkpointing and name != "convnet")
    labels = torch.tensor([0, 3, 5, 1])
    torch.manual_seed(1)
    functional.cross_entropy(model(x), labels).backward()
    functional.cross_entropy(forward(linear, x), labels).backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(linear.tangent.get_parameter(key).grad, parameter.grad)
    assert all(parameter.grad is None for parameter in linear.base.parameters())
    for key, buffer in model.named_buffers():  # running statistics
        torch.testing.assert_close(linear.base.get_buffer(key), buffer)


@pytest.mark.parametrize("name", ["open_clip", "timm"])
def test_checkpointing_computes_blocks_again_and_changes_nothing(name):
    model, x = build(name)
    kept, again = TangentModule(deepcopy(model)), deepcopy(TangentModule(model, checkpointing=True))
    tau = random_tau(kept, 1)
    calls = []
    block = next(part for part in again.base.modules() if isinstance(part, nn.GELU))
    block.register_forward_hook(lambda *_: calls.append(1))
    for module in (kept, again):
        set_tau(module, tau)
        forward(module, x).square().sum().backward()
    assert len(calls) == 2
    assert torch.equal(forward(kept, x), forward(again, x))
    for ours, theirs in zip(kept.tangent.parameters(), again.tangent.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    with torch.inference_mode():
        again(x)
    assert len(calls) == 4


def test_checkpointing_needs_blocks():
    with pytest.raises(ValueError, match="list of blocks to checkpoint in Linear, got a module without"):
        TangentModule(nn.Linear(2, 2), checkpointing=True)


def test_a_scope_leaves_the_rest_constant():
    model, x = build("timm")
    linear = TangentModule(deepcopy(model), scope=["blocks.1.attn.*"]).eval()
    tau = random_tau(linear, 1)
    assert list(tau) == [f"blocks.1.attn.{part}.{kind}" for part in ("qkv", "proj") for kind in ("weight", "bias")]
    set_tau(linear, tau)
    model.eval()
    torch.testing.assert_close(linear(x), model(x) + derivative(model, tau, x), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"'block\.\*'"):
        TangentModule(model, scope=["block.*"])


def train(module, x, y, steps=5):
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.mse_loss(module(x), y).backward()
        optimizer.step()


def test_weight_decay_pulls_to_the_base_or_to_zero():
    """A linear layer is its own expansion: decayed to zero it trains as ever, decayed to the base like its change."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    ordinary, change = deepcopy(layer), nn.Linear(3, 2).double()
    for parameter in change.parameters():
        nn.init.zeros_(parameter)
    start = layer(x).detach()
    train(ordinary, x, y)
    train(change, x, y - start)
    for decay_to, expected in (("zero", ordinary(x)), ("base", start + change(x))):
        linear = TangentModule(deepcopy(layer), decay_to=decay_to)
        train(linear, x, y)
        torch.testing.assert_close(linear(x), expected)
    assert (ordinary(x) - start - change(x)).abs().max() > 0.1


@pytest.mark.parametrize("decay_to", ["base", "zero"])
def test_task_vectors_are_read_and_written_exactly(decay_to):
    model, x = build("timm", torch.float32)
    parent = nn.ModuleDict({"encoder": TangentModule(deepcopy(model), decay_to=decay_to), "head": nn.Linear(8, 2)})
    linear = parent["encoder"].eval()
    names = [f"encoder.{name}" for name, _ in model.named_parameters()]
    dense = merged_parameters(parent)
    assert list(dense) == [*names, "head.weight", "head.bias"]
    base = {name: tensor.detach().clone() for name, tensor in dense.items()}
    tau = {f"encoder.{n}": t for n, t in random_tau(linear, 1, scale=1e-6).items()}
    state = state_of(parent, base, tau)
    start = linear(x)
    with swapped(parent, state):
        read = read_task_vector(parent, base)
        moved = linear(x)
        renew(parent, seed=0, task=1)
        assert torch.equal(linear(x), moved)
        nonlinear = parent["encoder"].folded().eval()
    assert torch.equal(linear(x), start)
    assert (moved - start).abs().max() > 0
    for name in names:
        exact = tau[name] if decay_to == "base" else (base[name] + tau[name]) - base[name]
        assert torch.equal(read[name], exact)
    weights = {n.removeprefix("encoder."): base[n] + tau[n] for n in names}
    torch.testing.assert_close(nonlinear(x), functional_call(model.eval(), weights, (x,)))


def test_the_nonlinear_model_is_evaluated_on_request():
    model, x = build("open_clip")
    linear, post_hoc = (TangentModule(deepcopy(model), evaluate=kind) for kind in ("linear", "nonlinear"))
    tau = random_tau(linear, 1, scale=0.1)
    set_tau(linear, tau)
    set_tau(post_hoc, tau)
    weights = {n: p + tau[n] for n, p in model.named_parameters()}
    torch.testing.assert_close(post_hoc.eval()(x), functional_call(model.eval(), weights, (x,)))
    torch.testing.assert_close(post_hoc.train()(x), linear(x))
    assert (post_hoc.eval()(x) - linear.eval()(x)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["open_clip", "timm"])
def test_under_autocast_a_small_change_survives(name):
    """It is computed beside the value, so its error is relative to itself: bfloat16 could not hold their sum."""
    model, x = build(name, torch.float32)
    model.eval()
    linear = TangentModule(deepcopy(model)).eval()
    tau = random_tau(linear, 1, scale=1e-4)
    set_tau(linear, tau)
    with torch.autocast("cpu", torch.bfloat16):
        moved = linear(x)
        moved.sum().backward()
        set_tau(linear, {name: torch.zeros_like(tensor) for name, tensor in tau.items()})
        start = linear(x)
    change = derivative(model.double(), {n: t.double() for n, t in tau.items()}, x.double())
    assert moved.dtype == torch.float32
    assert torch.linalg.norm(moved - start - change) < 0.05 * torch.linalg.norm(change)
    assert all(p.grad.dtype == torch.float32 for p in linear.tangent.parameters())


def test_global_switches_of_attention_stay_as_they_are():
    def switches():
        cuda = torch.backends.cuda
        return torch.backends.mha.get_fastpath_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()

    before = switches()
    model, x = build("open_clip")
    linear = TangentModule(model).eval()
    seen = []
    linear.base.ln_post.register_forward_hook(lambda *_: seen.append(switches()))
    linear(x)
    assert [before, switches()] == [before, *seen]


def test_a_base_that_is_trained_is_refused():
    linear = TangentModule(nn.Linear(2, 2))
    linear.requires_grad_(True)
    with pytest.raises(RuntimeError, match="expected a frozen base"):
        linear(torch.zeros(1, 2))


def test_copies_and_states_are_whole():
    model, x = build("timm")
    linear = TangentModule(model).eval()
    set_tau(linear, random_tau(linear, 1))
    copied = deepcopy(linear)
    other = TangentModule(build("timm")[0]).eval()
    other.load_state_dict(linear.state_dict())
    set_tau(linear, random_tau(linear, 2))
    assert torch.equal(copied(x), other(x))
    assert not torch.equal(copied(x), linear(x))


@pytest.mark.slow
def test_compiles_into_one_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = open_clip.transformer.ResidualAttentionBlock(4, 2, mlp_ratio=1.0)
    linear, x = TangentModule(block), torch.randn(2, 3, 4)
    set_tau(linear, random_tau(linear, 1))
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    grads = []
    for module in (linear, compiled):
        module.zero_grad()
        module(x).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in linear.tangent.parameters()])
    torch.testing.assert_close(*grads)
    with torch.inference_mode():
        torch.testing.assert_close(compiled.eval()(x), linear.eval()(x))
    torch._dynamo.reset()


def test_trains_under_ddp(tmp_path):
    model, x = build("open_clip")
    linear = TangentModule(model)
    linear(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in linear.tangent.parameters()]
    linear.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        DistributedDataParallel(linear)(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for parameter, gradient in zip(linear.tangent.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
