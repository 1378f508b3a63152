import copy

import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from clmerge.weights.batch_norm import estimated_statistics
from clmerge.weights.parametrization import running_statistics


def network(dropout=0.0):
    """A residual network of a few hundred weights, with statistics of another life."""
    torch.manual_seed(0)
    net = timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock,
        [1, 1, 1, 1],
        num_classes=3,
        channels=(4, 4, 6, 6),
        stem_width=4,
        drop_rate=dropout,
    )
    for norm in (part for part in net.modules() if isinstance(part, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var)
        norm.num_batches_tracked.fill_(7)
    return net.train()


def batches(sizes=(5, 4, 4)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 32, 32, generator=generator) for size in sizes]


def test_statistics_are_those_of_stochastic_weight_averaging_and_the_network_stays_as_it_was():
    net, twin = network(), network()
    before = copy.deepcopy(net.state_dict())
    found = estimated_statistics(net, batches())
    update_bn(batches(), twin)
    expected = running_statistics(twin)
    assert len(expected) >= 10
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(part.training and getattr(part, "momentum", 0.1) == 0.1 for part in net.modules())


def test_dropout_is_not_part_of_them():
    dropping = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3)).train()
    found = estimated_statistics(dropping, batches())
    mean = torch.stack([batch.mean(dim=(0, 2, 3)) for batch in batches()]).mean(dim=0)
    torch.testing.assert_close(found["1.running_mean"], mean)


def test_without_batch_normalisation_nothing_is_run():
    assert estimated_statistics(nn.Sequential(nn.LayerNorm(3)), iter(())) == {}
    assert estimated_statistics(nn.BatchNorm1d(3, track_running_stats=False), iter(())) == {}


@pytest.mark.parametrize("given", [[], [torch.ones(2, 3, 16, 16), torch.ones(2, 5, 16, 16)]])
def test_after_an_error_the_network_is_as_it_was(given):
    net = network()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises((ValueError, RuntimeError), match=r"expected images|expected input"):
        estimated_statistics(net, given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(part.training and getattr(part, "momentum", 0.1) == 0.1 for part in net.modules())
