import pytest
import torch
from support.attentive import CLASSES, HEADS, WIDTH, CrossAttention, data, model
from torch import nn
from torch.nn import functional

from clmerge.merging import MaTS
from clmerge.statistics.collectors import gram_matrices
from clmerge.statistics.output_factors import output_gram_matrices


def factors_by_hand(module, batches, labels):
    """The forward pass written out for one example at a time; the outputs of every matrix are gathered on the way."""
    module.eval()
    totals, rows = {}, {}
    for xs, ys in batches:
        for x, y in zip(xs, ys, strict=True):
            attn = module.attn
            x = x[None] + module.table
            packed = functional.linear(module.norm(x), attn.in_proj_weight, attn.in_proj_bias)
            heads = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in packed.chunk(3, -1)]
            weights = (heads[0] @ heads[1].mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
            out = attn.out_proj((weights @ heads[2]).transpose(1, 2).flatten(-2))
            first = module.mlp[0](x + out)
            second = module.mlp[3](functional.gelu(first))
            pooled = (x + out + second).mean(1) @ module.proj
            logits = module.head(pooled)
            outputs = {
                "attn.in_proj_weight": packed,
                "attn.out_proj.weight": out,
                "mlp.0.weight": first,
                "mlp.3.weight": second,
                "proj": pooled,
                "head.weight": logits,
            }
            log_p = functional.log_softmax(logits[0], dim=0)
            for name, output in outputs.items():
                rows[name] = rows.get(name, 0) + output.numel() // output.shape[-1]
            for c in range(CLASSES) if labels == "model" else [int(y)]:
                gradients = torch.autograd.grad(log_p[c], list(outputs.values()), retain_graph=True)
                weight = log_p[c].exp().item() if labels == "model" else 1.0
                for name, gradient in zip(outputs, gradients, strict=True):
                    g = gradient.flatten(0, -2)
                    totals[name] = totals.get(name, 0) + weight * g.T @ g
    return {name: total / rows[name] for name, total in totals.items()}


@pytest.mark.parametrize("labels", ["model", "true"])
def test_gradients_at_the_outputs_of_linear_layers_attention_and_projections(labels):
    wanted = factors_by_hand(model(), data(), labels)
    module = model()
    found = output_gram_matrices(module, data(), labels=labels)
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found, wanted)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_both_factors_are_the_fisher_of_one_example_with_one_token():
    torch.manual_seed(0)
    module, x = nn.Linear(3, 4, bias=False).double(), torch.randn(1, 3).double()
    log_p = functional.log_softmax(module(x)[0], dim=0)
    fisher = 0
    for c in range(4):
        gradient = torch.autograd.grad(log_p[c], module.weight, retain_graph=True)[0].flatten()
        fisher = fisher + log_p[c].exp().item() * gradient.outer(gradient)
    outputs = output_gram_matrices(module, [x], labels="model")["weight"]
    torch.testing.assert_close(torch.kron(outputs, gram_matrices(module, [x])["weight"]), fisher)


def test_sampled_labels_are_reproducible_and_right_on_average():
    module, (batch, *_) = model(), data((4,))
    exact = output_gram_matrices(module, [batch], labels="model")["head.weight"]
    draws = [output_gram_matrices(module, [batch], seed=seed)["head.weight"] for seed in range(100)]
    assert torch.equal(draws[3], output_gram_matrices(module, [batch], seed=3)["head.weight"])
    assert (torch.stack(draws).mean(0) - exact).norm() < 0.2 * exact.norm()


class _CrossClassifier(CrossAttention):
    def forward(self, x):
        return super().forward(x).mean(1)


def test_separate_projections_have_factors_of_their_own():
    torch.manual_seed(0)
    module, x = _CrossClassifier(keys=6, values=5), torch.randn(2, 3, 4)
    before = module(x)
    found = output_gram_matrices(module, [x], labels="model")
    assert sorted(found) == [
        f"attn.{name}" for name in ("k_proj_weight", "out_proj.weight", "q_proj_weight", "v_proj_weight")
    ]
    torch.testing.assert_close(module(x), before)
    with pytest.raises(ValueError, match="other keys"):
        output_gram_matrices(_CrossClassifier(), [x])


def test_frozen_parameters_modes_and_flags_are_left_as_they_were():
    module = model().train().requires_grad_(False)
    names = ["proj", "attn.in_proj_weight", "attn.in_proj_bias"]
    with torch.inference_mode():
        found = output_gram_matrices(module, [(x.clone(), y) for x, y in data()], names, labels="true")
    wanted = factors_by_hand(model(), data(), "true")
    torch.testing.assert_close(found, {name: wanted[name] for name in ("attn.in_proj_weight", "proj")})
    assert module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_mats_takes_both():
    module = model()
    statistics = {"gram": gram_matrices(module, data()), "output_gram": output_gram_matrices(module, data())}
    merger, taus = MaTS(outputs=True), {name: p.detach() for name, p in module.named_parameters()}
    merger.update(taus, statistics=statistics)
    torch.testing.assert_close(merger.compute(), taus)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: output_gram_matrices(model(), []), "got none"),
        (lambda: output_gram_matrices(model(), data(), ["table"]), "got none"),
        (lambda: output_gram_matrices(model(), data(), ["heads"]), "which it does not have"),
        (lambda: output_gram_matrices(model(), [data()[0][0]], labels="true"), "got inputs alone"),
        (lambda: output_gram_matrices(model(), data(), labels="empirical"), "'model', 'true' or 'sampled'"),
        (lambda: output_gram_matrices(model().mlp, data()), r"expected logits of shape .*\(5, 5, 8\)"),
    ],
)
def test_what_cannot_be_collected_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
