import pytest
import torch
from support.matrix_references import by_kind, mean, svd
from support.references import Case

from clmerge.merging import SVC


def svc(alpha, scale):
    def rule(taus):
        u, s, vh = svd(taus.sum(axis=0))
        factors = []
        for r in range(len(s)):
            response = s[r] * vh[r]
            own = [u[:, r] @ tau for tau in taus]
            counts = [response @ a / (a @ a) if a @ a > 1e-20 else 0.0 for a in own]
            factors.append(len(taus) / sum(max(alpha, count) for count in counts))
        return scale * (u * (s * factors)) @ vh

    return by_kind(rule, mean(scale))


CASES = {
    "SVC": Case(SVC, svc(1.0, 1.0), generic=True, condition=1000),
    "SVC weak": Case(lambda: SVC(0.5, scale=0.3), svc(0.5, 0.3), generic=True, condition=1000),
}

GENERATOR = torch.Generator().manual_seed(0)


def merged(merger, taus):
    for tau in taus:
        merger.update({"w": tau})
    return merger.compute()["w"]


def test_a_task_that_comes_again_counts_once():
    tau = torch.randn(5, 7, generator=GENERATOR, dtype=torch.float64)
    torch.testing.assert_close(merged(SVC(), [tau, tau, tau]), tau)
    torch.testing.assert_close(merged(SVC(), [tau]), tau)


def test_tasks_with_inputs_and_outputs_of_their_own_are_added():
    one, other = torch.randn(2, 6, 8, generator=GENERATOR, dtype=torch.float64)
    one[3:], one[:, 4:], other[:3], other[:, :4] = 0, 0, 0, 0
    torch.testing.assert_close(merged(SVC(), [one, other]), one + other)


def test_alpha_must_be_positive():
    with pytest.raises(ValueError, match="alpha"):
        SVC(0.0)
