import pytest
import torch
from support.learning import distance, doubles, learn
from support.references import Case, average

from clmerge.merging import HyperplaneSoup, LearnedSoup, TrajectorySoup

CASES = {
    "LearnedSoup unlearned": Case(lambda: LearnedSoup(steps=0), average(1.0)),
    "HyperplaneSoup unlearned": Case(lambda: HyperplaneSoup(steps=0), average(1.0)),
    "TrajectorySoup unlearned": Case(lambda: TrajectorySoup(steps=0), average(1.0)),
}
VECTORS = [doubles(w=[1.0, 0.0]), doubles(w=[0.0, 1.0]), doubles(w=[-3.0, -3.0])]


def test_weights_are_positive_and_sum_to_one_and_a_dominated_model_gets_less():
    merger = learn(LearnedSoup(steps=50), VECTORS, distance([0.5, 0.5]))
    weights = merger.coefficients["w"].softmax(dim=0)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert weights[2] < 0.1
    assert weights[0] == pytest.approx(float(weights[1]), abs=1e-3)


@pytest.mark.parametrize("steps", [0, 5, 200])
def test_weights_on_the_hyperplane_sum_to_one_and_may_be_negative(steps):
    merger = learn(HyperplaneSoup(steps=steps, lr=0.05), VECTORS, distance([2.0, 2.0]))
    taus = torch.stack([vector["w"] for vector in VECTORS])
    merged = merger.compute()["w"]
    # Three vectors of two entries: the weights of sum 1 are unique.
    system = torch.cat([taus.t(), torch.ones(1, 3, dtype=torch.float64)])
    weights = torch.linalg.solve(system, torch.cat([merged, torch.ones(1, dtype=torch.float64)]))
    moved = merger.coefficients[""] / (taus - taus.mean(dim=0)).norm(dim=1)
    torch.testing.assert_close(weights, 1 / 3 + moved - moved.mean())
    if steps == 200:
        torch.testing.assert_close(merged, torch.full((2,), 2.0, dtype=torch.float64), atol=1e-2, rtol=0)
        assert weights.min() < 0


def test_blocks_have_weights_of_their_own_and_equal_models_are_their_average():
    vector = {"blocks.0.w": torch.ones(2), "blocks.1.w": torch.ones(2), "norm": torch.ones(1)}
    merger = learn(HyperplaneSoup(steps=3), [vector] * 2, lambda vector, *_: vector["blocks.1.w"].sum())
    assert sorted(merger.coefficients) == ["", "blocks.0.", "blocks.1."]
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in merger.compute().values())


def test_a_step_is_the_gradient_projected_onto_the_span():
    # W = ((1, 0, 0), (1, 1, 0)) and g = (1, 2, 3): the projection is (1, 2, 0).
    slope = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    idle, merger = TrajectorySoup(steps=0), TrajectorySoup(steps=1, lr=0.5)
    learn(idle, [doubles(w=[1.0, 0.0, 0.0])], None)
    merger.load_state_dict(idle.state_dict() | {"settings": merger.settings()})
    learn(merger, [doubles(w=[1.0, 1.0, 0.0])], lambda vector, *_: (slope * vector["w"]).sum())
    mean = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(merger.compute()["w"], mean - 0.5 * torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))


def test_vectors_that_repeat_add_nothing_to_the_span():
    merger = learn(TrajectorySoup(steps=20, lr=0.1), [doubles(w=[1.0, 0.0])] * 3, distance([0.5, 0.7]))
    torch.testing.assert_close(merger.compute()["w"], torch.tensor([0.5, 0.0], dtype=torch.float64), atol=0.2, rtol=0)
    assert torch.isfinite(merger.coefficients["all"]).all()
