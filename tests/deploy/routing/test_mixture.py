import pytest
import torch

from clmerge.deploy.routing import Gates, MixtureLinear


def layer_of(num_tasks=3, rank=2, width=5, out=4, *, bias=True):
    torch.manual_seed(0)
    weight, a, b = (
        torch.randn(*s, dtype=torch.float64) for s in [(out, width), (num_tasks, rank, width), (num_tasks, rank, out)]
    )
    biases = [torch.randn(*s, dtype=torch.float64) if bias else None for s in [(out,), (num_tasks, out)]]
    return MixtureLinear(weight, biases[0], a, b, biases[1], Gates())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(), (6,), (2, 3)])
def test_mixing_outputs_is_mixing_weights_for_every_image(tokens, bias):
    layer = layer_of(bias=bias)
    x = torch.randn(7, *tokens, 5, dtype=torch.float64)
    gates = torch.rand(7, 3, dtype=torch.float64)
    layer.gates.value = gates
    found = layer(x)
    for image, own, answer in zip(x, gates, found, strict=True):
        weight = layer.weight + sum(g * b.T @ a for g, a, b in zip(own, layer.a, layer.b, strict=True))
        expected = image @ weight.T
        if bias:
            expected = expected + layer.bias + own @ layer.delta_bias
        assert torch.allclose(answer, expected, rtol=0, atol=1e-12)


def test_every_token_may_have_gates_of_its_own():
    layer = layer_of()
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    gates = torch.rand(2, 6, 3, dtype=torch.float64)
    layer.gates.value = gates
    found = layer(x)
    layer.gates.value = gates.flatten(0, 1)
    assert torch.allclose(found.flatten(0, 1), layer(x.flatten(0, 1)), rtol=0, atol=1e-12)


def test_a_layer_without_gates_says_so():
    with pytest.raises(RuntimeError, match="expected gates"):
        layer_of()(torch.zeros(1, 5, dtype=torch.float64))


def test_factors_must_fit_the_weight():
    with pytest.raises(ValueError, match=r"factors \(T, r, in\) and \(T, r, out\)"):
        MixtureLinear(torch.zeros(4, 5), None, torch.zeros(2, 3, 5), torch.zeros(2, 3, 5), None, Gates())
