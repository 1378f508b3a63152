import copy

import pytest
import torch
from lightning.pytorch import Trainer
from support.tiny import ForeignModule, toy_loader
from support.toy_parametrized import Shifted
from torch import nn
from torch.func import functional_call

from clmerge.callbacks import MergeCallback
from clmerge.merging import TIES, MagMax
from clmerge.weights.parametrization import (
    dense_weights,
    folded,
    merged_parameters,
    own_names,
    parametrized,
    read_task_vector,
    renew,
    running_statistics,
    state_of,
)
from clmerge.weights.swap import swapped


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


@pytest.fixture
def tuned(plain):
    """The same network; the first two layers are tuned by a shift, the last one directly."""
    torch.manual_seed(1)
    first = Shifted(nn.Sequential(copy.deepcopy(plain[0]), copy.deepcopy(plain[1])))
    net = nn.Sequential(nn.Sequential(first), copy.deepcopy(plain[2]))
    for shift in first.shift.values():
        nn.init.normal_(shift)
    return net


DENSE = ["0.0.0.weight", "0.0.0.bias", "0.0.1.weight", "0.0.1.bias", "1.weight", "1.bias"]


def some(names, tensors, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensors[name].shape, generator=generator) for name in names}


def clones(module, names):
    return {name: tensor.detach().clone() for name, tensor in dense_weights(module, names).items()}


def test_names_are_those_of_the_network_before_it_was_tuned(tuned):
    assert list(merged_parameters(tuned)) == DENSE
    assert own_names(tuned)["0.0.0.weight"] == "0.0.base.0.weight"
    assert own_names(tuned)["0.0.1.running_mean"] == "0.0.base.1.running_mean"
    assert own_names(tuned)["1.bias"] == "1.bias"
    assert set(running_statistics(tuned)) == {"0.0.1.running_mean", "0.0.1.running_var"}
    assert list(merged_parameters(tuned, include=["0.*"], exclude=["*.bias"])) == ["0.0.0.weight", "0.0.1.weight"]


def test_what_is_frozen_is_not_merged(tuned):
    tuned[0][0].shift.requires_grad_(False)
    assert list(merged_parameters(tuned)) == ["1.weight", "1.bias"]
    with pytest.raises(ValueError, match="matches only frozen or integer ones"):
        merged_parameters(tuned, include=["0.*"])


def test_a_state_reads_back_as_the_vector_it_was_made_of(tuned):
    base = clones(tuned, merged_parameters(tuned))
    tau = some(base, base)
    state = state_of(tuned, base, tau)
    assert "0.0.shift.0/weight" in state
    with swapped(tuned, state):
        found = read_task_vector(tuned, base)
        assert list(found) == DENSE
        for name in base:
            torch.testing.assert_close(found[name], tau[name])
            torch.testing.assert_close(dense_weights(tuned, [name])[name], base[name] + tau[name])
    assert torch.equal(state_of(tuned, base, {})["0.0.shift.0/weight"], torch.zeros(6, 4))


def test_a_state_serves_functional_call(tuned, plain):
    tuned.eval()
    base = clones(tuned, merged_parameters(tuned))
    x = torch.randn(5, 4)
    expected = tuned(x)
    names = dict(zip(DENSE, [n for n, _ in plain.named_parameters()], strict=True))
    functional_call(plain.eval(), {names[n]: t for n, t in base.items()}, (x,))
    torch.testing.assert_close(functional_call(tuned, state_of(tuned, base, {}), (x,)), expected)
    torch.testing.assert_close(functional_call(plain, {names[n]: t for n, t in base.items()}, (x,)), expected)


def test_buffers_are_named_as_before_tuning_too(tuned):
    base = {"1.bias": torch.zeros(3)}
    state = state_of(tuned, base, {}, buffers={"0.0.1.running_mean": torch.ones(6)})
    assert state["0.0.base.1.running_mean"].tolist() == [1.0] * 6
    assert set(state) == {"1.bias", "0.0.base.1.running_mean"}


def test_dense_weights_are_differentiable(tuned):
    dense_weights(tuned, ["0.0.0.weight"])["0.0.0.weight"].square().sum().backward()
    shift = tuned[0][0].shift["0/weight"]
    torch.testing.assert_close(shift.grad, 2 * (tuned[0][0].base[0].weight + shift).detach())


def test_compiled_parts_have_the_names_of_the_network(tuned):
    base = clones(tuned, merged_parameters(tuned))
    tuned[0][0] = torch.compile(tuned[0][0], backend="eager")
    assert list(parametrized(tuned)) == ["0.0."]
    assert list(merged_parameters(tuned)) == DENSE
    for tensor in read_task_vector(tuned, base).values():
        torch.testing.assert_close(tensor, torch.zeros_like(tensor), atol=1e-6, rtol=0)


def test_a_module_may_be_parametrized_as_a_whole_and_the_outermost_answers(plain):
    inner = Shifted(nn.Linear(2, 2))
    outer = Shifted(nn.Sequential(inner))
    assert list(parametrized(outer)) == [""]
    assert list(parametrized(nn.Sequential(outer, nn.Linear(2, 2)))) == ["0."]
    whole = Shifted(plain)
    assert list(merged_parameters(whole)) == [name for name, _ in plain.named_parameters()]
    with folded(whole) as found:
        assert set(found.state_dict()) == set(plain.state_dict())


def test_folded_has_the_dense_weights_and_is_unfolded_again(tuned):
    tuned.eval()
    x = torch.randn(5, 4)
    expected, part = tuned(x), tuned[0][0]
    with pytest.raises(KeyError), folded(tuned) as found:  # noqa: PT012
        assert found is tuned
        assert isinstance(tuned[0][0], nn.Sequential)
        assert [name for name, _ in found.named_parameters()] == DENSE
        torch.testing.assert_close(found(x), expected)
        raise KeyError
    assert tuned[0][0] is part


def test_renewal_depends_on_seed_task_and_name_alone():
    def draws(seed, task):
        net = nn.ModuleDict({"a": Shifted(nn.Linear(2, 2)), "b": Shifted(nn.Linear(2, 2))})
        renew(net, seed=seed, task=task)
        return [net["a"].draws[0], net["b"].draws[0]]

    assert draws(0, 0) == draws(0, 0)
    assert len({*draws(0, 0), *draws(0, 1), *draws(1, 0)}) == 6


def test_a_missing_name_is_an_error_that_names_it(tuned):
    wrong = {"0.0.0.weights": torch.zeros(1), "1.bias": torch.zeros(3)}
    for call in (
        lambda: read_task_vector(tuned, wrong, origin="x.pt"),
        lambda: state_of(tuned, wrong, {}, origin="x.pt"),
    ):
        with pytest.raises(RuntimeError, match=r"the 2 tensors of x\.pt, got a model without 1 .*'0\.0\.0\.weights'"):
            call()
    with pytest.raises(ValueError, match=r"expected one shape for '1\.bias'"):
        read_task_vector(tuned, {"1.bias": torch.zeros(4)})


@pytest.mark.parametrize("policy", ["base", "previous", "merged"])
def test_merging_does_not_depend_on_how_the_weights_are_parametrized(policy):
    """A shift by SGD takes the very steps of the weights themselves."""

    def run(tune):
        torch.manual_seed(0)
        model = ForeignModule()
        if tune:
            model.net[0], model.net[3] = Shifted(model.net[0]), Shifted(model.net[3])
        merge = MergeCallback([MagMax(scale=0.5), TIES(density=0.5)], start_policy=policy)
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        states = []
        for task in range(3):
            trainer = Trainer(max_epochs=2, accelerator="cpu", callbacks=[merge], enable_checkpointing=False, **options)
            trainer.fit(model, toy_loader(task))
            states.append(merge.merged_state())
        model.test_step = lambda batch, batch_idx: states.append(clones(model, merge.base))
        trainer.test(model, toy_loader(9, num=8), verbose=False)
        with merge.merged(model, "ties"):
            states.append(clones(model, merge.base))
        return states, model

    expected, _ = run(tune=False)
    found, model = run(tune=True)
    for state, reference in zip(found, expected, strict=True):
        assert list(state) == list(reference)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, reference[name], rtol=1e-4, atol=1e-6)
    assert len(model.net[0].draws) == 3
