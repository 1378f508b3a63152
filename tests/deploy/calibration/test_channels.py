import pytest
import torch
from torch import nn

from clmerge.deploy.calibration.channels import EPS, Channels, Spread, matched, matched_layers, spreads


def column(value):
    return torch.tensor([value], dtype=torch.float64)


def test_the_mean_of_two_experts_keeps_the_weight_and_shifts_the_bias():
    """Experts (mean, std) (0, 1) and (2, 3); merged mean 0.5, variance 4: w' = w and b' = 0.5."""
    goal = Spread.average([Spread(column(0.0), column(1.0)), Spread(column(2.0), column(3.0))])
    weight, bias = torch.tensor([[3.0, -2.0]]), torch.zeros(1)
    found = matched(weight, bias, Spread(column(0.5), column(2.0)), goal)
    assert torch.equal(found[0], weight)
    assert found[1].tolist() == [0.5]


def test_averaging_two_independent_channels_loses_variance_and_matching_gives_it_back():
    torch.manual_seed(0)
    inputs = torch.randn(4000, 2)
    inputs = (inputs - inputs.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(inputs.T, correction=0))).T
    experts, merged = [nn.Linear(2, 1) for _ in range(2)], nn.Sequential(nn.Linear(2, 1))
    with torch.no_grad():
        for layer, row in zip([*experts, merged[0]], ([1.0, 0.0], [0.0, 1.0], [0.5, 0.5]), strict=True):
            layer.weight.copy_(torch.tensor([row]))
            layer.bias.zero_()
    goals = [spreads([Channels("0", layer)], layer, inputs.split(1000))["0"] for layer in experts]
    one = Channels("0", merged[0])
    found = spreads([one], merged, inputs.split(1000))["0"]
    assert found.std.item() == pytest.approx(0.5**0.5, abs=1e-4)
    one.match(found, Spread.average(goals))
    assert spreads([one], merged, inputs.split(1000))["0"].std.item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("sizes", [[7], [1, 3, 3], [5, 2]])
def test_spreads_are_those_of_all_rows_whatever_the_batches(sizes):
    torch.manual_seed(0)
    inputs = 1000.0 + torch.randn(7, 5, 4)
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Linear(2, 2))
    layers = [Channels("2", network[2]), Channels("0", network[0])]
    found = spreads(layers, network, inputs.split(sizes))
    assert list(found) == ["0", "2"]  # as they are called
    with torch.no_grad():
        rows = network[0](inputs).double().flatten(0, 1)
    torch.testing.assert_close(found["0"].mean, rows.mean(0))
    torch.testing.assert_close(found["0"].std, (rows.var(0, correction=0) + EPS).sqrt(), rtol=1e-5, atol=0)
    assert not network[0]._forward_hooks


def test_convolutions_and_packed_attention_have_channels():
    torch.manual_seed(0)
    images = torch.randn(6, 3, 5, 5)
    conv = nn.Conv2d(3, 4, 3)
    found = spreads([Channels("c", conv)], conv, [images])["c"]
    with torch.no_grad():
        torch.testing.assert_close(found.mean, conv(images).double().mean(dim=(0, 2, 3)))
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    tokens = torch.randn(6, 3, 8)

    def attend(x):
        return attention(x, x, x, need_weights=False)[0]

    one = Channels("attn", attention)
    found = spreads([one], attend, [tokens])["attn"]
    with torch.no_grad():
        rows = (tokens @ attention.in_proj_weight.T + attention.in_proj_bias).flatten(0, 1).double()
    torch.testing.assert_close(found.mean, rows.mean(0), atol=1e-6, rtol=1e-5)
    goal = Spread(torch.arange(24.0).double(), torch.full((24,), 2.0).double())
    assert set(one.match(found, goal)) == {"attn.in_proj_weight", "attn.in_proj_bias"}
    again = spreads([one], attend, [tokens])["attn"]
    torch.testing.assert_close(again.mean, goal.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.std, goal.std, rtol=1e-4, atol=0)


def test_layers_are_those_that_match_and_are_trained():
    network = nn.ModuleDict({"fc1": nn.Linear(2, 2), "fc2": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    found = matched_layers(network, ["fc*", "norm"], ["fc1.weight", "norm.weight"])
    assert [one.name for one in found] == ["fc1"]
    network["fc1"].bias = None
    with pytest.raises(ValueError, match="expected layers with a bias, which shifts the means of channels, got 'fc1'"):
        matched_layers(network, ["fc1"], ["fc1.weight"])
