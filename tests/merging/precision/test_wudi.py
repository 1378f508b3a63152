from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.matrix_references import matrices_or_mean
from support.references import Case

from clmerge.merging import WUDI, ACTMat, RegMean, WeightAverage


def least_interference(ridge: float, normalize: bool, towards: Callable) -> Callable:
    """The minimiser of the interference as one least-squares problem, without any Gram matrix."""

    def solve(name, taus, tasks):
        norms = [np.linalg.norm(tau) if normalize else 1.0 for tau in taus]
        if not np.any(taus):
            return np.zeros(taus[0].shape)
        rows = np.vstack([tau / (norm or 1) for tau, norm in zip(taus, norms, strict=True)])
        wanted = np.vstack([tau @ tau.T / (norm or 1) for tau, norm in zip(taus, norms, strict=True)])
        pull = np.sqrt(ridge * np.sum(rows**2) / rows.shape[1])
        rows = np.vstack([rows, pull * np.eye(rows.shape[1])])
        wanted = np.vstack([wanted, pull * towards(taus, axis=0).T])
        return np.linalg.lstsq(rows, wanted, rcond=None)[0].T

    return solve


def wudi_adam(steps: int, lr: float) -> Callable:
    def solve(name, taus, tasks):
        merged, first, second = np.sum(taus, axis=0), 0.0, 0.0
        grams = [tau.T @ tau / (np.linalg.norm(tau) ** 2 or 1) for tau in taus]
        for step in range(1, steps + 1):
            gradient = sum(2 * (merged - tau) @ gram for tau, gram in zip(taus, grams, strict=True))
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            rms = np.sqrt(second / (1 - 0.999**step))
            merged = merged - lr * first / (1 - 0.9**step) / (rms + 1e-8)
        return merged

    return solve


CASES = {
    "WUDI ridge": Case(
        lambda: WUDI("ridge"), matrices_or_mean(least_interference(1e-8, normalize=True, towards=np.sum))
    ),
    "WUDI": Case(
        lambda: WUDI(steps=4, lr=1e-3, scale=0.5),
        matrices_or_mean(wudi_adam(4, 1e-3), 0.5),
        homogeneous=False,
    ),
    "ACTMat": Case(ACTMat, matrices_or_mean(least_interference(1e-8, normalize=False, towards=np.mean))),
}


def taus(num_tasks=3, shape=(5, 4)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).double() for _ in range(num_tasks)]


def fold(merger, vectors, name="w"):
    for vector in vectors:
        merger.update({name: vector})
    return merger.compute()[name]


def interference(merged, vectors):
    return sum(((merged - tau) @ tau.t()).square().sum() / tau.square().sum() for tau in vectors)


def test_is_the_early_stopped_adam_of_the_paper():
    vectors = [0.01 * tau for tau in taus()]
    merged = sum(vectors).clone().requires_grad_()
    optimizer = torch.optim.Adam([merged], lr=1e-5)
    for _ in range(300):
        optimizer.zero_grad()
        interference(merged, vectors).backward()
        optimizer.step()
    torch.testing.assert_close(fold(WUDI(), vectors), merged.detach(), rtol=1e-9, atol=1e-12)
    assert interference(merged, vectors) < interference(sum(vectors), vectors)


def test_the_closed_form_has_no_gradient():
    vectors = taus()
    merged = fold(WUDI("ridge", ridge=1e-14), vectors).requires_grad_()
    interference(merged, vectors).backward()
    torch.testing.assert_close(merged.grad, torch.zeros_like(merged), atol=1e-10, rtol=0)


def test_a_strong_pull_leads_to_the_sum():
    torch.testing.assert_close(fold(WUDI("ridge", ridge=1e9), taus()), sum(taus()))


def test_tasks_in_orthogonal_subspaces_are_added():
    one, other = taus(2)
    vectors = [one * torch.tensor([1.0, 1, 0, 0]), other * torch.tensor([0.0, 0, 1, 1])]
    for solver in ("adam", "ridge"):
        torch.testing.assert_close(fold(WUDI(solver), vectors), sum(vectors), rtol=0, atol=1e-6)


def test_actmat_is_regmean_with_the_task_vectors_as_inputs():
    merger = RegMean(1.0)
    for tau in taus():
        merger.update({"w": tau}, statistics={"gram": {"w": tau.t() @ tau}})
    torch.testing.assert_close(fold(ACTMat(), taus()), merger.compute()["w"])


def test_what_is_no_matrix_is_averaged_or_kept():
    biases = [tau[0] for tau in taus()]
    torch.testing.assert_close(fold(WUDI(), biases), fold(WeightAverage(), biases))
    torch.testing.assert_close(fold(ACTMat(), biases), fold(WeightAverage(), biases))
    assert torch.equal(fold(WUDI(others="keep"), biases), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("build", [lambda: WUDI("ridge"), WUDI, ACTMat])
def test_an_input_by_output_projection_is_turned(build):
    turned = fold(build(), [tau.t() for tau in taus()], name="visual.proj")
    assert turned.is_contiguous()
    torch.testing.assert_close(turned.t(), fold(build(), taus()))


@pytest.mark.parametrize("build", [lambda: WUDI("ridge"), lambda: WUDI(lr=1e-3, steps=20), ACTMat])
def test_a_task_vector_of_zeros_does_not_divide_by_zero(build):
    vectors = [*taus(2), torch.zeros(5, 4).double()]
    assert torch.isfinite(fold(build(), vectors)).all()
    torch.testing.assert_close(fold(WUDI("ridge"), vectors), fold(WUDI("ridge"), taus(2)))


def test_matrices_are_moved_with_the_rest():
    merger = WUDI("ridge")
    merger.update({"w": torch.ones(2, 3)})
    merger.to("meta")
    assert {tensor.device.type for tensor in merger.state_dict()["extras"]["grams"]["w"].values()} == {"meta"}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WUDI("sgd"), "expected solver"),
        (lambda: WUDI(others="drop"), "expected others"),
        (lambda: WUDI(steps=0), "steps from 1 to 100,000, got 0"),
        (lambda: WUDI(steps=10**9), "steps from 1 to 100,000"),
        (lambda: ACTMat(0.0), "ridge above 0"),
    ],
)
def test_settings_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
