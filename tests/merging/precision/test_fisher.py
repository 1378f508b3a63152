import numpy as np
import pytest
import torch
from support.references import Batch, Case, fishers

from clmerge.merging import UGM, Fisher, FisherMaskNodes


def fisher_average(scale: float, granularity: str = "entry", normalize: bool = False) -> Batch:
    def batch(vectors, tasks):
        weights = fishers(vectors, tasks)
        if granularity == "row":
            weights = [
                {name: np.ones(f.shape) * f.mean(axis=1, keepdims=True) if f.ndim > 1 else f for name, f in w.items()}
                for w in weights
            ]
        if normalize:
            norms = [np.linalg.norm(np.concatenate([f.ravel() for f in w.values()])) for w in weights]
            weights = [{name: f / norm for name, f in w.items()} for w, norm in zip(weights, norms, strict=True)]
        return {
            name: scale
            * np.sum([w[name] * v[name] for w, v in zip(weights, vectors, strict=True)], axis=0)
            / np.sum([w[name] for w in weights], axis=0)
            for name in vectors[0]
        }

    return batch


def ugm(scale: float, prior: float) -> Batch:
    def batch(vectors, tasks):
        weights = fishers(vectors, tasks)
        merged = {}
        for name in vectors[0]:
            hessian = prior + scale * np.sum([w[name] for w in weights], axis=0)
            merged[name] = sum(
                scale * (prior + w[name]) / hessian * v[name] for w, v in zip(weights, vectors, strict=True)
            )
        return merged

    return batch


CASES = {
    "Fisher": Case(Fisher, fisher_average(1.0)),
    "Fisher row, normalized": Case(
        lambda: Fisher(granularity="row", normalize=True, scale=0.5), fisher_average(0.5, "row", True)
    ),
    "FisherMaskNodes": Case(FisherMaskNodes, fisher_average(1.0)),
    "FisherMaskNodes scale": Case(lambda: FisherMaskNodes(scale=0.5), fisher_average(0.5)),
    "UGM": Case(UGM, ugm(1.0, 1e-6)),
    "UGM prior": Case(lambda: UGM(scale=0.5, prior=1.0), ugm(0.5, 1.0)),
}


def update(merger, tau, fisher):
    merger.update({"w": torch.tensor(tau)}, statistics={"fisher": {"w": torch.tensor(fisher)}})
    return merger


def merged(merger, *pairs):
    for tau, fisher in pairs:
        update(merger, tau, fisher)
    return merger.compute()["w"]


def test_minimises_the_weighted_distances_to_the_tasks():
    taus, fishers = torch.randn(3, 7), torch.rand(3, 7)
    tau = merged(Fisher(), *zip(taus.tolist(), fishers.tolist(), strict=True)).requires_grad_()
    (fishers * (tau - taus).square()).sum().backward()
    torch.testing.assert_close(tau.grad, torch.zeros(7), atol=1e-5, rtol=0)


def test_where_nobody_knows_anything_the_mean_is_taken():
    tau = merged(Fisher(), ([1.0, 1.0], [0.0, 1e-3]), ([5.0, 5.0], [0.0, 0.0]))
    torch.testing.assert_close(tau, torch.tensor([3.0, 1.0]))


def test_rows_share_their_information():
    tau = merged(
        Fisher(granularity="row"),
        ([[1.0, 2.0], [1.0, 2.0]], [[4.0, 2.0], [1.0, 1.0]]),
        ([[5.0, 6.0], [5.0, 6.0]], [[0.0, 2.0], [3.0, 3.0]]),
    )
    torch.testing.assert_close(tau, torch.tensor([[2.0, 3.0], [4.0, 5.0]]))


def test_normalised_tasks_weigh_the_same_whatever_the_size_of_their_fisher():
    tau = merged(Fisher(normalize=True), ([1.0], [1e-6]), ([3.0], [1e3]))
    torch.testing.assert_close(tau, torch.tensor([2.0]))


def test_ugm_goes_from_the_fisher_average_to_task_arithmetic_with_its_prior():
    pairs = ([1.0], [1.0]), ([5.0], [3.0])
    torch.testing.assert_close(merged(UGM(prior=1e-12), *pairs), merged(Fisher(), *pairs))
    torch.testing.assert_close(merged(UGM(0.5, prior=1e6), *pairs), torch.tensor([3.0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("merger", [Fisher(), UGM(prior=1e-10)])
def test_a_task_that_knows_nearly_everything_of_an_entry_stays(merger):
    # In float32, 1000 + 1e-9 - 1000 is nothing but rounding.
    update(update(merger, [0.3, 0.3], [1e-9, 1.0]), [0.4, 0.4], [1e-9, 1.0])
    dominant = {"w": torch.tensor([0.7, 0.7])}, {"fisher": {"w": torch.tensor([1e3, 1.0])}}
    merger.update(dominant[0], statistics=dominant[1])
    before = merger.state_dict()
    with pytest.raises(ValueError, match="merge the other tasks anew"):
        merger.downdate(dominant[0], statistics=dominant[1])
    assert str(merger.state_dict()) == str(before)
    merger.downdate({"w": torch.tensor([0.4, 0.4])}, statistics={"fisher": {"w": torch.tensor([1e-9, 1.0])}})
    assert merger.tasks == (0, 2)


@pytest.mark.parametrize(
    ("fisher", "message"),
    [
        ({}, "none for 'w'"),
        ({"w": torch.ones(3)}, r"shape \(2,\) for 'w'"),
        ({"w": torch.tensor([1.0, -1.0])}, "without negative entries"),
        ({"w": torch.tensor([1.0, float("nan")])}, "NaN"),
        ({"w": torch.tensor([1, 2])}, "int64"),
    ],
)
@pytest.mark.parametrize("rule", [Fisher, UGM])
def test_refused_information_leaves_the_state_as_it_was(rule, fisher, message):
    merger = update(rule(), [1.0, 2.0], [1.0, 1.0])
    before = merger.compute()["w"]
    with pytest.raises(ValueError, match=message):
        merger.update({"w": torch.ones(2)}, statistics={"fisher": fisher})
    assert merger.num_tasks == 1
    assert torch.equal(merger.compute()["w"], before)
    with pytest.raises(TypeError, match="parameter name -> tensor"):
        merger.update({"w": torch.ones(2)}, statistics={"fisher": 1.0})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Fisher(0.0), "floor above 0"),
        (lambda: Fisher(granularity="layer"), "'entry' or 'row'"),
        (lambda: UGM(prior=0.0), "prior above 0"),
        (lambda: UGM(scale=-1.0), "scale and prior above 0"),
    ],
)
def test_settings_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
