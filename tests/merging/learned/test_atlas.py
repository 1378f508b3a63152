import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from support.learning import doubles, gradients_of, learn
from support.references import Case, total

from clmerge.merging import ATLAS, Given, Outputs

CASES = {"ATLAS unlearned": Case(lambda: ATLAS(steps=0), total(0.0))}

GENERATOR = np.random.default_rng(0)
INPUTS, LABELS = GENERATOR.normal(size=(40, 3)), GENERATOR.integers(0, 2, size=40)
TAUS = [GENERATOR.normal(size=(2, 3)) for _ in range(2)]


def cross_entropy(vector, objective, tasks):
    logits = torch.from_numpy(INPUTS) @ vector["w"].t()
    labels = torch.from_numpy(LABELS)
    return objective(Outputs(logits, logits), Given(torch.arange(2), torch.arange(2), labels=labels))


def test_the_first_forward_is_theta_zero_and_its_gradient_leads_away():
    seen = []

    def gradients(objective, tasks, *, seed, expert):
        def gradient(vector):
            seen.append(vector["w"].clone())
            return gradients_of(cross_entropy)(objective, tasks, seed=seed, expert=expert)(vector)

        return gradient

    merger = ATLAS(steps=1, decay=0.0)
    merger.update(doubles(w=TAUS[0].tolist()), gradients=gradients)
    assert not seen[0].any()
    probabilities = np.full((40, 2), 0.5)
    slope = (probabilities - np.eye(2)[LABELS]).T @ INPUTS / 40
    assert np.sign(merger.coefficients["w"].item()) == -np.sign((slope * TAUS[0]).sum())


def test_a_convex_problem_ends_where_scipy_does():
    def loss(coefficients):
        logits = INPUTS @ sum(c * tau for c, tau in zip(coefficients, TAUS, strict=True)).T
        return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(40), LABELS])

    best = minimize(loss, np.zeros(2), method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10}).x
    merger = learn(ATLAS(steps=3000, lr=0.01, decay=0.0), [doubles(w=tau.tolist()) for tau in TAUS], cross_entropy)
    np.testing.assert_allclose(merger.coefficients["w"].numpy(), best, atol=1e-6)


def test_decay_draws_coefficients_to_theta_zero():
    vectors = [doubles(w=tau.tolist()) for tau in TAUS]
    free, drawn = (learn(ATLAS(steps=300, lr=0.01, decay=d), vectors, cross_entropy) for d in (0.0, 5.0))
    assert drawn.coefficients["w"].abs().sum() < free.coefficients["w"].abs().sum()
    with pytest.raises(ValueError, match="decay of 0 or more"):
        ATLAS(decay=-1)
