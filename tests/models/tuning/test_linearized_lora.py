import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.func import functional_call, jvp
from torch.nn import functional

from clmerge import ContinualClassifier, Learner
from clmerge.merging import MagMax, TaskArithmetic
from clmerge.models import LinearizedLoRA, OpenClip, TangentModule, Timm, add_lora
from clmerge.models.tuning.linearized_lora import LowRankTangentModule
from clmerge.results.run_folder import RunFolder
from clmerge.streams import ClassIncremental, SklearnDigits, StreamDataModule
from clmerge.weights import TaskVectorBank, load_tensors
from clmerge.weights.parametrization import merged_parameters, read_factors, read_task_vector, renew, state_of
from clmerge.weights.swap import assign, own_tensors

IMAGES = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def encoders(clip):
    """The plain encoder, in float64, and the linearized LoRA of it with B's that are not zero."""
    plain, tuned = OpenClip(clip).double().eval(), OpenClip(clip)
    LinearizedLoRA(rank=2, alpha=3.0).prepare(tuned)
    linear = tuned.double().eval().model.visual
    shake(linear, 1)
    return plain.model.visual, linear


def shake(linear, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in linear.tangent.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def dense_tau(linear):
    """``alpha / rank * B A_0`` by weight, written out; slice by slice for a packed input projection."""
    base, tangents = dict(linear.base.named_parameters()), dict(linear.tangent.named_parameters())
    vector = {}
    for name, a in base.items():
        if "lora_A_" in name:
            b = tangents[name.replace("lora_A_", "lora_B_")]
            parts = zip(a, b, strict=True) if a.ndim == 3 else [(a, b)]
            vector[name.replace("lora_A_", "")] = torch.cat([1.5 * one_b @ one_a for one_a, one_b in parts]).detach()
    return vector


def expansion(plain, tau):
    theta = {name: parameter.detach() for name, parameter in plain.named_parameters()}
    h = 1e-6
    with torch.no_grad():
        ahead, behind = (
            functional_call(plain, {n: theta[n] + step * t for n, t in tau.items()}, (IMAGES,)) for step in (h, -h)
        )
        return plain(IMAGES) + (ahead - behind) / (2 * h)


def test_output_is_the_expansion_along_the_low_rank_change(clip):
    plain, linear = encoders(clip)
    tau = dense_tau(linear)
    assert {name.split(".")[3] for name in tau} == {"attn", "mlp"}
    torch.testing.assert_close(linear(IMAGES), expansion(plain, tau), rtol=1e-6, atol=1e-8)


def test_the_derivative_in_a_is_zero_where_b_is(clip):
    """Why A has no tangent: the expansion in both factors is this one."""
    backbone = OpenClip(clip).double().eval()
    names = add_lora(backbone.model.visual, "mlp", rank=2)
    assert names
    a = {n: p.detach() for n, p in backbone.model.visual.named_parameters() if "lora_A_" in n}
    direction = {n: torch.randn_like(p) for n, p in a.items()}

    def run(weights):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return functional_call(backbone.model.visual.train(), weights, (IMAGES,))

    TangentModule(nn.Linear(1, 1))  # loads PyTorch's forward mode
    _, change = jvp(run, (a,), (direction,))
    assert torch.equal(change, torch.zeros_like(change))


def test_adding_the_factors_of_tasks_adds_their_task_vectors_and_outputs(clip):
    plain, linear = encoders(clip)
    start = plain(IMAGES)
    factors, increments, vectors = [], [], []
    base = {name: plain.get_parameter(name) for name in merged_parameters(linear)}
    for seed in range(3):
        shake(linear, seed)
        factors.append({n: p.detach().clone() for n, p in linear.tangent.named_parameters() if p.requires_grad})
        increments.append(linear(IMAGES) - start)
        vectors.append(read_task_vector(linear, base))
    assign(dict(linear.tangent.named_parameters()), {n: sum(f[n] for f in factors) for n in factors[0]})
    torch.testing.assert_close(linear(IMAGES), start + sum(increments))
    expected = {name: sum(tau[name] for tau in vectors) for name in base}
    torch.testing.assert_close(read_task_vector(linear, base), expected)


def test_task_vectors_of_any_rank_are_read_and_written(clip):
    plain, linear = encoders(clip)
    base = {name: tensor.detach() for name, tensor in plain.named_parameters() if name in linear.names()}
    read = read_task_vector(linear, base)
    for name, tau in dense_tau(linear).items():
        torch.testing.assert_close(read[name], tau)
    merged = {name: torch.randn_like(tensor) for name, tensor in base.items()}
    assign(own_tensors(linear), state_of(linear, base, merged))
    for name, tau in read_task_vector(linear, base).items():
        assert torch.equal(tau, merged[name])
    torch.testing.assert_close(linear(IMAGES), expansion(plain, merged), rtol=1e-6, atol=1e-8)


def test_task_vectors_are_kept_as_factors_while_they_are_low_rank(clip):
    plain, linear = encoders(clip)
    base = {name: plain.get_parameter(name).detach() for name in linear.names()}
    factors, vector = read_factors(linear, base), read_task_vector(linear, base)
    assert set(factors) == set(base)
    assert all(torch.equal(factors[name].dense(), tau) for name, tau in vector.items())
    renew(linear, seed=0, task=1)
    assert not read_factors(linear, base)


def test_a_new_task_goes_on_from_what_was_learnt_with_the_same_a(clip):
    _, linear = encoders(clip)
    before = linear(IMAGES)
    a = {name: p.clone() for name, p in linear.base.named_parameters() if "lora_A_" in name}
    renew(linear, seed=0, task=1)
    torch.testing.assert_close(linear(IMAGES), before)
    assert all(not p.any() for p in linear.tangent.parameters() if p.requires_grad)
    assert all(torch.equal(p, a[n]) for n, p in linear.base.named_parameters() if n in a)
    shake(linear, 2)
    vector = linear.change()
    renew(linear, seed=0, task=2)
    torch.testing.assert_close(linear.change(), vector)


def test_folded_and_evaluated_post_hoc_it_is_an_ordinary_model(clip):
    plain, linear = encoders(clip)
    tau = dense_tau(linear)
    folded = linear.folded().eval()
    assert {n: type(m) for n, m in folded.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    weights = {n: p + tau.get(n, 0.0) for n, p in plain.named_parameters()}
    plain.load_state_dict(folded.state_dict())
    torch.testing.assert_close(dict(plain.named_parameters()), weights)
    linear.evaluate = "nonlinear"
    torch.testing.assert_close(linear(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("build", [lambda clip: OpenClip(clip), lambda clip: Timm("test_vit", image_size=32)])
def test_only_b_is_trained_and_a_comes_from_the_seed(clip, build):
    first, second, other = (build(clip) for _ in range(3))
    names = LinearizedLoRA(rank=2).prepare(first)
    LinearizedLoRA(rank=2).prepare(second)
    LinearizedLoRA(rank=2, seed=1).prepare(other)
    trained = [name for name, parameter in first.named_parameters() if parameter.requires_grad]
    assert len(trained) == len(names)
    assert all("lora_B_" in name for name in trained)
    a, again, different = (
        [p for n, p in backbone.named_parameters() if "lora_A_" in n] for backbone in (first, second, other)
    )
    assert all(torch.equal(one, two) for one, two in zip(a, again, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(a, different, strict=True))


def test_gradients_are_those_of_lora_at_its_start(clip):
    plain, linear = encoders(clip)
    for parameter in linear.tangent.parameters():
        nn.init.zeros_(parameter)
    functional.mse_loss(linear(IMAGES), torch.ones(3, 8).double()).backward()
    functional.mse_loss(plain(IMAGES), torch.ones(3, 8).double()).backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    base = dict(linear.base.named_parameters())
    for name, parameter in linear.tangent.named_parameters():
        if parameter.requires_grad:
            weight, a = name.replace("lora_B_", ""), base[name.replace("lora_B_", "lora_A_")]
            dense = gradients[weight].view(*parameter.shape[:-1], -1)
            torch.testing.assert_close(parameter.grad, 1.5 * dense @ a.mT)


def test_a_module_without_factors_is_refused():
    with pytest.raises(ValueError, match="expected LoRA layers in Linear, got none; call add_lora first"):
        LowRankTangentModule(nn.Linear(2, 2))


@pytest.mark.parametrize("start_policy", ["base", "previous", "merged"])
def test_a_run_merges_dense_task_vectors(clip, tmp_path, monkeypatch, start_policy):
    monkeypatch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
    torch.manual_seed(0)
    module = ContinualClassifier(
        OpenClip(clip),
        tuning=LinearizedLoRA(rank=2),
        loss_classes="all",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )
    stream = ClassIncremental(SklearnDigits(), num_tasks=2, val_fraction=0.1)
    mergers = [TaskArithmetic(scale=1.0), MagMax()]
    learner = Learner(stream, module, mergers, StreamDataModule(64), start_policy=start_policy)
    plain = OpenClip(clip).eval()

    def trainer(**given):
        return Trainer(
            **{"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1, "accelerator": "cpu"} | given
        )

    learner.fit(RunFolder.create(tmp_path / "run"), trainer=trainer)
    bank = list(TaskVectorBank(tmp_path / "run" / "bank"))
    ranks = [torch.linalg.matrix_rank(tau[n], rtol=1e-4) for tau in bank for n in tau if n.endswith("c_fc.weight")]
    assert max(ranks) == 2  # of the sum over tasks, too: they share A
    total = {name: sum(tau[name] for tau in bank) for name in bank[0]}
    saved = load_tensors(tmp_path / "run" / "model" / "task_arithmetic.safetensors")
    start = plain.model.state_dict()
    for name, tau in total.items():
        key = name.removeprefix("backbone.model.")
        torch.testing.assert_close(saved[key], start[key] + tau)
    plain.model.load_state_dict(saved)
