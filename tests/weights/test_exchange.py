import pytest
import torch
from torch import nn
from torch.func import functional_call

from clmerge.weights.exchange import Exchange


class Counted(nn.Linear):
    def __init__(self, size):
        super().__init__(size, size)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Blocks(nn.Module):
    """A list of blocks that a parent loops over, changing tensors in place in between as some networks do."""

    def __init__(self, *, in_place=False):
        super().__init__()
        self.blocks = nn.ModuleList(Counted(4) for _ in range(4))
        self.norm = nn.BatchNorm1d(4)
        self.in_place = in_place

    def forward(self, x):
        for block in self.blocks:
            y = block(x)
            x = y.add_(1) if self.in_place else y + 1
        return self.norm(x)


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    return [{"blocks.2.weight": torch.randn(4, 4, generator=generator)} for _ in range(3)]


@pytest.mark.parametrize("in_place", [False, True])
def test_shared_parts_give_the_same_bits_and_are_computed_once(states, in_place):
    torch.manual_seed(0)
    model = Blocks(in_place=in_place).eval()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [torch.randn(5, 4) for _ in range(2)]
    with torch.no_grad():
        expected = [[functional_call(model, state, (x,)) for state in states] for x in batches]
        for block in model.blocks:
            block.calls = 0
        with Exchange(model, states[0], share=True) as exchange:
            for x, wanted in zip(batches, expected, strict=True):
                exchange.next_input()
                for state, out in zip(states, wanted, strict=True):
                    exchange.put(state)
                    assert torch.equal(model(x), out)
    # below the exchanged block: once a batch; above it the input differs, so that block is left alone
    assert [block.calls for block in model.blocks] == [2, 2, 6, 6]
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    assert all("forward" not in part.__dict__ for part in model.modules())


def test_nothing_is_kept_beyond_the_memory(states):
    model = Blocks().eval()
    with torch.no_grad(), Exchange(model, states[0], share=True, memory=200) as exchange:
        for state in states:
            exchange.put(state)
            model(torch.ones(5, 4))
    assert [block.calls for block in model.blocks] == [1, 3, 3, 3]  # 160 bytes of input and output each


def test_what_is_left_out_is_the_modules_own(states):
    model = Blocks().eval()
    x = torch.ones(2, 4)
    own = model(x)
    with Exchange(model, ["blocks.2.weight", "norm.running_mean"]) as exchange:
        exchange.put(states[0] | {"norm.running_mean": torch.ones(4)})
        assert not torch.equal(model(x), own)
        exchange.put({})
        assert torch.equal(model(x), own)


def test_tied_tensors_are_exchanged_together():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    with Exchange(model, ["0.weight"]) as exchange:
        exchange.put({"0.weight": torch.eye(2)})
        assert torch.equal(model(torch.ones(1, 2)), torch.ones(1, 2))
    assert model[1].weight is model[0].weight


def test_the_modules_own_tensors_come_back_after_an_exception(states):
    model = Blocks()
    before = model.blocks[2].weight

    def fail():
        with Exchange(model, states[0], share=True) as exchange:
            exchange.put(states[0])
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail()
    assert model.blocks[2].weight is before


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError):
        Exchange(Blocks(), ["blocks.9.weight"])
