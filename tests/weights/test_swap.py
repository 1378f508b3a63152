import pytest
import torch
from torch import nn

from clmerge.weights.swap import assign, full_copy, named_tensors, swapped


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def state(net):
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def values():
    return {"0.weight": torch.full((2, 3), 5.0), "1.running_mean": torch.full((2,), 7.0)}


def test_values_are_in_place_inside_and_the_old_ones_afterwards(net):
    before, weight = state(net), net[0].weight
    with swapped(net, values()):
        assert same(state(net), before | values())
        assert net[0].weight is weight, "optimizers keep their references"
    assert same(state(net), before)


def test_the_old_values_come_back_after_an_exception(net):
    before = state(net)

    def fail():
        with swapped(net, values()):
            net[0].weight.data.zero_()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert same(state(net), before)


def test_swaps_may_be_nested(net):
    before = state(net)
    with swapped(net, values()):
        with swapped(net, {"0.weight": torch.zeros(2, 3)}):
            assert not net[0].weight.any()
        assert same(state(net), before | values())
    assert same(state(net), before)


def test_a_shape_that_differs_copies_nothing(net):
    before = state(net)
    wrong = values() | {"0.bias": torch.zeros(3)}
    with (
        pytest.raises(RuntimeError, match=r"'0\.bias' of shape \(3,\), got \(2,\) in the model"),
        swapped(net, wrong),
    ):
        raise AssertionError("the block was run")
    assert same(state(net), before)


def test_a_name_that_is_missing_copies_nothing(net):
    before = state(net)
    wrong = values() | {"2.weight": torch.zeros(2), "2.bias": torch.zeros(2)}
    with (
        pytest.raises(RuntimeError, match=r"the 4 tensors of a\.ckpt.*without 2 of them, the first '2\.weight'"),
        swapped(net, wrong, origin="a.ckpt"),
    ):
        raise AssertionError("the block was run")
    assert same(state(net), before)


def test_values_take_the_dtype_of_the_model(net):
    net.bfloat16()
    assign(named_tensors(net, values(), origin="here"), values())
    assert net[0].weight.dtype == torch.bfloat16
    assert net[0].weight.unique().tolist() == [5.0]


def test_names_may_be_any_iterable(net):
    found = named_tensors(net, (name for name in ["0.bias", "1.running_var"]), origin="here")
    assert found["0.bias"] is net[0].bias
    assert found["1.running_var"] is net[1].running_var
    with pytest.raises(RuntimeError, match="'nope'"):
        named_tensors(net, iter(["nope"]), origin="here")


@pytest.mark.parametrize("part", ["whole", "inner"])
def test_names_of_compiled_models_are_those_of_the_model(net, part):
    before = state(net)
    model = torch.compile(net, backend="eager") if part == "whole" else net
    if part == "inner":
        net[0] = torch.compile(net[0], backend="eager")
    assert all("_orig_mod." in name for name, _ in model.named_parameters() if "0.weight" in name)
    with swapped(model, values()):
        assert net[0].weight.unique().tolist() == [5.0]
    assert torch.equal(net[0].weight, before["0.weight"])


def test_a_full_copy_is_detached_and_shares_nothing(net):
    copy = full_copy(net[0].weight)
    assert not copy.requires_grad
    assert torch.equal(copy, net[0].weight)
    copy.zero_()
    assert net[0].weight.any()
    assert full_copy(net[0].weight, torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
def test_swaps_that_end_in_any_order_give_the_originals_back(order):
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    # The third one covers less than the others.
    swaps = [swapped(module, {name: torch.full_like(t, float(i)) for name, t in before.items()}) for i in (1, 2)]
    swaps.append(swapped(module, {"1.bias": torch.full((2,), 3.0)}))
    for swap in swaps:
        swap.__enter__()
    assert module[0].bias.tolist() == [2.0, 2.0]
    assert module[1].bias.tolist() == [3.0, 3.0]
    for index in order:
        swaps[index].__exit__(None, None, None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_swaps_of_two_modules_do_not_touch_each_other():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    before = [module.bias.detach().clone() for module in (first, second)]
    swaps = [swapped(module, {"bias": torch.zeros(2)}) for module in (first, second)]
    for swap in swaps:
        swap.__enter__()
    swaps[0].__exit__(None, None, None)
    assert torch.equal(first.bias, before[0])
    assert second.bias.tolist() == [0.0, 0.0]
    swaps[1].__exit__(None, None, None)
    assert torch.equal(second.bias, before[1])
