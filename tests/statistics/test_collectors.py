import pytest
import torch
from support.attentive import CLASSES, HEADS, WIDTH, CrossAttention, data, model
from torch import nn
from torch.nn import functional

from clmerge.merging import RegMean
from clmerge.statistics.collectors import diagonal_fisher, gram_matrices


def fisher_by_loops(module, batches, labels):
    module.eval()
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    total, count = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}, 0
    for xs, ys in batches:
        for x, y in zip(xs, ys, strict=True):
            count += 1
            log_p = functional.log_softmax(module(x[None])[0], dim=0)
            for c in range(CLASSES) if labels == "model" else [int(y)]:
                gradients = torch.autograd.grad(log_p[c], list(trained.values()), retain_graph=True)
                weight = log_p[c].exp().item() if labels == "model" else 1.0
                for name, gradient in zip(trained, gradients, strict=True):
                    total[name] += weight * gradient**2
    return {name: tensor / count for name, tensor in total.items()}


@pytest.mark.parametrize("labels", ["model", "true"])
@pytest.mark.parametrize("chunk_size", [1, 3, 50])
def test_fisher_is_that_of_a_loop_over_examples_and_classes(labels, chunk_size):
    wanted = fisher_by_loops(model(), data(), labels)
    module = model()
    fisher = diagonal_fisher(module, data(), labels=labels, chunk_size=chunk_size)
    assert fisher.keys() == wanted.keys()
    torch.testing.assert_close(fisher, wanted)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_fisher_of_chosen_parameters_in_float32():
    names = ["attn.in_proj_weight", "norm.bias"]
    fisher = diagonal_fisher(model().float(), [x.float() for x, _ in data()], names)
    assert list(fisher) == names
    assert {tensor.dtype for tensor in fisher.values()} == {torch.float32}
    wanted = fisher_by_loops(model(), data(), "model")["attn.in_proj_weight"]
    torch.testing.assert_close(fisher["attn.in_proj_weight"].double(), wanted, rtol=1e-3, atol=1e-7)


def test_sampled_labels_are_reproducible_and_right_on_average():
    module, (batch, *_) = model(), data((4,))
    exact = diagonal_fisher(module, [batch])["head.weight"]
    draws = [diagonal_fisher(module, [batch], labels="sampled", seed=seed)["head.weight"] for seed in range(200)]
    assert torch.equal(draws[3], diagonal_fisher(module, [batch], labels="sampled", seed=3)["head.weight"])
    assert not torch.equal(draws[3], draws[4])
    error = torch.linalg.vector_norm(torch.stack(draws).mean(0) - exact) / torch.linalg.vector_norm(exact)
    assert error < 0.15


def test_fisher_of_a_tied_parameter_counts_both_uses():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(3, 3, bias=False)
            self.two = nn.Linear(3, 3, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(torch.tanh(self.one(x)))

    torch.manual_seed(0)
    module, batches = Tied().double(), [(torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 0]))]
    torch.testing.assert_close(diagonal_fisher(module, batches), fisher_by_loops(module, batches, "model"))


def grams_by_hand(module, batches):
    """The forward pass written out; X of every matrix is gathered on the way."""
    seen = {}
    module.eval()
    for x, _ in batches:
        attn = module.attn
        x = x + module.table
        y = module.norm(x)
        heads = [
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in functional.linear(y, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
        ]
        weights = (heads[0] @ heads[1].mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
        z = (weights @ heads[2]).transpose(1, 2).flatten(-2)
        x = x + attn.out_proj(z)
        hidden = functional.gelu(module.mlp[0](x))
        pooled = (x + module.mlp[3](hidden)).mean(1)
        for name, inputs in {
            "attn.in_proj_weight": y,
            "attn.out_proj.weight": z,
            "mlp.0.weight": x,
            "mlp.3.weight": hidden,
            "proj": pooled,
            "head.weight": pooled @ module.proj,
        }.items():
            seen.setdefault(name, []).append(inputs.flatten(0, -2))
    return {name: torch.cat(rows).detach() for name, rows in seen.items()}


@pytest.mark.parametrize("normalize", [False, True])
def test_gram_matrices_of_linear_layers_attention_and_projections(normalize):
    rows = grams_by_hand(model(), data())
    grams = gram_matrices(model(), data(), normalize=normalize)
    assert grams.keys() == rows.keys()
    for name, x in rows.items():
        torch.testing.assert_close(grams[name], x.t() @ x / (len(x) if normalize else 1), msg=name)


def test_gram_matrices_of_chosen_parameters_fit_regmean():
    names = ["attn.out_proj.weight", "attn.in_proj_bias", "proj", "table"]
    grams = gram_matrices(model(), data(), names)
    assert sorted(grams) == ["attn.out_proj.weight", "proj"]
    merger, parameters = RegMean(), dict(model().named_parameters())
    merger.update({name: parameters[name] for name in names}, statistics={"gram": grams})
    torch.testing.assert_close(merger.compute()["proj"], parameters["proj"].detach())


def test_separate_projections_have_gram_matrices_of_their_own():
    module, x = CrossAttention(keys=6, values=5), torch.randn(2, 3, 4)
    grams = gram_matrices(module, [x])
    assert len(grams) == 4
    for name, inputs in zip("qkv", (x, *module.keys_and_values(x)), strict=True):
        rows = inputs.flatten(0, 1)
        torch.testing.assert_close(grams[f"attn.{name}_proj_weight"], (rows.t() @ rows).double())


def test_packed_projections_of_cross_attention_are_refused_and_nothing_stays_changed():
    module, x = CrossAttention().train(), torch.randn(2, 3, 4)
    module.attn.out_proj.eval()
    modes = [part.training for part in module.modules()]
    before = module(x)
    with pytest.raises(ValueError, match=r"'attn\.in_proj_weight'.*other keys"):
        gram_matrices(module, [x])
    assert [part.training for part in module.modules()] == modes
    torch.testing.assert_close(module(x), before)
    assert list(gram_matrices(module, [x], ["attn.out_proj.weight"])) == ["attn.out_proj.weight"]


@pytest.mark.parametrize("collect", [diagonal_fisher, gram_matrices])
def test_modes_flags_and_gradients_are_restored_after_an_error(collect):
    module = model().train()
    module.mlp.eval()
    modes = [part.training for part in module.modules()]
    enabled = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError):
        collect(module, [*data(), torch.randn(2, 5, WIDTH + 1).double()])
    assert [part.training for part in module.modules()] == modes
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("collect", [diagonal_fisher, gram_matrices])
def test_works_inside_no_grad_and_inference_mode(collect):
    wanted = collect(model(), data())
    module, batches = model(), data()
    with torch.no_grad():
        torch.testing.assert_close(collect(module, batches), wanted)
    with torch.inference_mode():
        inside = collect(module, [(x.clone(), y) for x, y in batches])
    assert not any(tensor.is_inference() for tensor in inside.values())
    torch.testing.assert_close(inside, wanted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diagonal_fisher(model(), []), "at least one example"),
        (lambda: diagonal_fisher(model(), data(), ["heads"]), "'heads', which it does not have"),
        (lambda: diagonal_fisher(model(), [data()[0][0]], labels="true"), "got inputs alone"),
        (lambda: diagonal_fisher(model(), data(), labels="empirical"), "'model', 'true' or 'sampled'"),
        (lambda: diagonal_fisher(model(), data(), chunk_size=0), "1 example or more"),
        (lambda: diagonal_fisher(model().mlp, data()), r"expected logits of shape .*\(1, 5, 8\)"),
        (lambda: gram_matrices(model(), []), "got none"),
        (lambda: gram_matrices(model(), data(), ["table"]), "got none"),
        (lambda: gram_matrices(model(), data(), ["heads"]), "which it does not have"),
    ],
)
def test_what_cannot_be_collected_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
