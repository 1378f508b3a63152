import numpy as np
import pytest
import torch
from support.learning import doubles, gradients_of, learn
from support.references import Case, each, total

from clmerge.merging import AdaRank
from clmerge.merging.learned.adarank import straight_through


def truncated(scale, ratio, *, centred=False):
    """The sum of the task matrices, each with its largest singular values."""

    def rule(taus):
        centre = taus.mean(axis=0) if centred else np.zeros(taus.shape[1:])
        moved = taus - centre
        if taus.ndim == 3 and taus.size:
            u, s, vh = np.linalg.svd(moved, full_matrices=False)
            s[:, round(ratio * s.shape[1]) :] = 0
            moved = (u * s[:, None]) @ vh
        return centre + scale * moved.sum(axis=0)

    return each(rule)


CASES = {
    "AdaRank unlearned": Case(lambda: AdaRank(steps=0), total(0.3)),
    "AdaRank half": Case(
        lambda: AdaRank(0.5, rank_ratio=0.5, include=["*"], steps=0), truncated(0.5, 0.5), generic=True, condition=10
    ),
    "AdaRank centred": Case(
        lambda: AdaRank(1.0, centred=True, rank_ratio=0.5, include=["*"], steps=0),
        truncated(1.0, 0.5, centred=True),
        generic=True,
        condition=10,
    ),
}


def test_the_straight_through_estimate_in_numbers():
    x = torch.tensor([0.1, -0.1], dtype=torch.float64, requires_grad=True)
    kept = straight_through(x)
    kept.sum().backward()
    assert kept.tolist() == [1, 0]
    assert torch.sigmoid(x.detach() / 10).tolist() == pytest.approx([0.5025, 0.4975], abs=1e-6)
    assert x.grad.tolist() == pytest.approx([0.024999, 0.024999], abs=1e-6)


def test_the_gradient_of_a_singular_value_is_that_of_its_share_in_the_matrix():
    generator = torch.Generator().manual_seed(0)
    tau, slope = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    merger = AdaRank(1.0, include=["w"], steps=1, lr=1e-9)
    merger.update({"w": tau}, gradients=gradients_of(lambda vector, *_: (slope * vector["w"]).sum()))
    u, s, vh = torch.linalg.svd(tau, full_matrices=False)
    wanted = torch.stack([u[:, i] @ slope @ vh[i] * s[i] for i in range(3)])
    moved = merger.coefficients["mask w"][0] - 0.1
    assert torch.equal(moved.sign(), -wanted.sign())


def test_a_singular_value_that_hurts_is_dropped():
    # The task matrix is diag(2, 1); the loss wants the first entry only.
    wanted = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    merger = AdaRank(1.0, include=["w"], steps=150)
    learn(merger, [doubles(w=[[2.0, 0.0], [0.0, 1.0]])], lambda vector, *_: (vector["w"] - wanted).square().sum())
    assert merger.coefficients["mask w"][0].sign().tolist() == [1, -1]
    assert merger.compute()["w"][1, 1] == pytest.approx(0, abs=1e-12)


def test_only_the_named_matrices_are_decomposed():
    merger = AdaRank(steps=0)
    merger.update({"attn.weight": torch.ones(2, 3), "attn.bias": torch.ones(2), "head": torch.ones(2, 2)}, gradients=id)
    assert [name for name in merger.coefficients if name.startswith("mask")] == ["mask attn.weight"]
