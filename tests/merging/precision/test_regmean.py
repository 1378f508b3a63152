import pytest
import torch
from support.matrix_references import regmean
from support.references import Case

from clmerge.merging import RegMean, WeightAverage

CASES = {
    "RegMean": Case(RegMean, regmean(0.9, 1e-8, 1.0)),
    "RegMean ridge": Case(lambda: RegMean(1.0, ridge=0.1, scale=0.5), regmean(1.0, 0.1, 0.5)),
}


def data(seed, num_inputs=6, num_outputs=4, num_examples=50):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_examples, num_inputs, generator=generator).double()
    return torch.randn(num_outputs, num_inputs, generator=generator).double(), inputs


def merged(merger, pairs):
    for tau, inputs in pairs:
        merger.update({"w": tau}, statistics={"gram": {"w": inputs.t() @ inputs}})
    return merger.compute()["w"]


def test_fits_the_outputs_of_all_tasks_in_the_least_squares_sense():
    pairs = [data(seed) for seed in range(3)]
    inputs = torch.cat([x for _, x in pairs])
    outputs = torch.cat([x @ tau.t() for tau, x in pairs])
    wanted = torch.linalg.lstsq(inputs, outputs).solution.t()
    torch.testing.assert_close(merged(RegMean(1.0, ridge=1e-14), pairs), wanted)


def test_weights_and_task_vectors_are_merged_alike():
    pairs, base = [data(seed) for seed in range(3)], data(9)[0]
    moved = [(tau + base, inputs) for tau, inputs in pairs]
    torch.testing.assert_close(merged(RegMean(), moved) - base, merged(RegMean(), pairs))


def test_directions_without_inputs_and_matrices_without_any_are_averaged():
    pairs = [(tau, inputs * torch.tensor([1.0, 1, 1, 0, 1, 1])) for tau, inputs in (data(0), data(1))]
    mean = (pairs[0][0] + pairs[1][0]) / 2
    tau = merged(RegMean(), pairs)
    torch.testing.assert_close(tau[:, 3], mean[:, 3])
    assert not torch.allclose(tau[:, 2], mean[:, 2])
    torch.testing.assert_close(merged(RegMean(), [(tau, 0 * inputs) for tau, inputs in pairs]), mean)


def test_without_off_diagonals_every_input_is_weighted_by_its_energy():
    pairs = [data(0), data(1)]
    energies = [inputs.square().sum(0) for _, inputs in pairs]
    wanted = sum(tau * energy for (tau, _), energy in zip(pairs, energies, strict=True)) / sum(energies)
    torch.testing.assert_close(merged(RegMean(0.0, ridge=1e-14), pairs), wanted)


def test_what_has_no_gram_matrix_is_averaged():
    merger, mean = RegMean(), WeightAverage()
    for seed in range(2):
        vector = {"w": data(seed)[0], "table": data(seed + 5)[0], "bias": data(seed)[0][0]}
        merger.update(vector, statistics={"gram": {"w": torch.eye(6)}})
        mean.update(vector)
    result, wanted = merger.compute(), mean.compute()
    torch.testing.assert_close([result["table"], result["bias"]], [wanted["table"], wanted["bias"]])


def test_an_input_by_output_projection_is_turned():
    pairs = [data(0), data(1)]
    merger = RegMean()
    for tau, inputs in pairs:
        merger.update({"visual.proj": tau.t()}, statistics={"gram": {"visual.proj": inputs.t() @ inputs}})
    torch.testing.assert_close(merger.compute()["visual.proj"], merged(RegMean(), pairs).t())


@pytest.mark.parametrize(
    ("grams", "message"),
    [
        ({"w": torch.eye(4)}, r"shape \(6, 6\) for 'w'"),
        ({"w": torch.eye(6), "ww": torch.eye(6)}, "got one for 'ww'"),
        ({"w": torch.eye(6) * float("inf")}, "NaN, Inf"),
        ({}, "for example 'w'"),
    ],
)
def test_refused_gram_matrices_leave_the_state_as_it_was(grams, message):
    merger = RegMean()
    before = merged(merger, [data(0)])
    with pytest.raises(ValueError, match=message):
        merger.update({"w": data(1)[0]}, statistics={"gram": grams})
    assert torch.equal(merger.compute()["w"], before)


def test_joining_refuses_other_gram_matrices_and_changes_nothing():
    one, other = RegMean(), RegMean()
    before = merged(one, [data(0)])
    other.update({"w": data(1)[0]}, task=1, statistics={"gram": {}})
    with pytest.raises(ValueError, match="for example 'w'"):
        one.merge_state(other)
    assert one.num_tasks == 1
    assert torch.equal(one.compute()["w"], before)


@pytest.mark.parametrize("settings", [{"reduce": 1.1}, {"ridge": 0.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"expected {next(iter(settings))}"):
        RegMean(**settings)
