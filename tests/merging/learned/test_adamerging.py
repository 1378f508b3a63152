import numpy as np
import pytest
import torch
from support.learning import distance, doubles, learn
from support.references import Case, average, stacked, total, trimmed_by_model

from clmerge.merging import AdaMerging, Given, Outputs


def elected(scale):
    """The sum of the trimmed entries that have the elected sign, as in TIES."""

    def batch(vectors, tasks):
        vectors = [trimmed_by_model(vector, 0.2) for vector in vectors]
        signs = {name: np.sign(stacked(vectors, name).sum(axis=0)) for name in vectors[0]}
        majority = 1 if sum(sign.sum() for sign in signs.values()) > 0 else -1
        signs = {name: np.where(sign == 0, majority, sign) for name, sign in signs.items()}
        return {
            name: scale * np.where(np.sign(stacked(vectors, name)) == sign, stacked(vectors, name), 0).sum(axis=0)
            for name, sign in signs.items()
        }

    return batch


CASES = {
    "AdaMerging unlearned": Case(lambda: AdaMerging(steps=0), total(0.3)),
    "AdaMerging task-wise": Case(lambda: AdaMerging(granularity="task", steps=0, init=0.5), total(0.5)),
    "AdaMerging++": Case(lambda: AdaMerging(elect=True, steps=0), elected(0.3)),
    "AdaMerging average": Case(lambda: AdaMerging(init=None, steps=0), average(1.0)),
}
E11, E22 = [[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]


def entropy(vector, objective, tasks):
    """The entropy of softmax((I + w) x) for x = (1, 0.5)."""
    logits = ((torch.eye(2) + vector["w"]) @ torch.tensor([1.0, 0.5], dtype=torch.float64))[None]
    return objective(Outputs(logits, logits), Given(torch.arange(2), torch.arange(2)))


def test_the_published_numbers_of_one_step():
    merger = AdaMerging(steps=0)
    learn(merger, [doubles(w=E11)], entropy)
    stepping = AdaMerging(steps=1)
    stepping.load_state_dict(merger.state_dict() | {"settings": stepping.settings()})
    learn(stepping, [doubles(w=E22)], entropy)
    assert stepping.losses["first"] == pytest.approx(0.662847, abs=1e-6)
    assert stepping.coefficients["w"].tolist() == pytest.approx([0.301, 0.299], abs=1e-7)


def squared_error(vector, objective, tasks):
    """Of the linear model <w, x> on three points."""
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    return (inputs @ vector["w"] - torch.tensor([0.5, 0.2, 0.7], dtype=torch.float64)).square().sum() / 2


def test_a_squared_error_ends_at_the_normal_equations():
    merger = learn(AdaMerging(steps=3000, lr=0.01), [doubles(w=[1.0, 0.0]), doubles(w=[1.0, 1.0])], squared_error)
    assert merger.coefficients["w"].tolist() == pytest.approx([0.3, 0.2], abs=1e-6)


def test_equal_vectors_get_equal_coefficients():
    merger = AdaMerging(steps=0)
    learn(merger, [doubles(w=E22)] * 2, entropy)
    stepping = AdaMerging(steps=50)
    stepping.load_state_dict(merger.state_dict() | {"settings": stepping.settings()})
    learn(stepping, [doubles(w=E22)], entropy)
    learned = stepping.coefficients["w"].tolist()
    assert learned[0] == learned[1] == learned[2] != 0.3


def test_a_permutation_of_the_tasks_permutes_the_coefficients():
    def coefficients(order):
        merger, stepping = AdaMerging(steps=0), AdaMerging(steps=20)
        vectors = [doubles(w=E11), doubles(w=E22)]
        learn(merger, [vectors[order[0]]], entropy)
        stepping.load_state_dict(merger.state_dict() | {"settings": stepping.settings()})
        return learn(stepping, [vectors[order[1]]], entropy).coefficients["w"].tolist()

    assert coefficients([0, 1]) == coefficients([1, 0])[::-1]


def test_a_coefficient_at_the_bound_comes_back():
    """The released code's clamp within the loss has no gradient below 0, where a coefficient stays for good."""
    merger = learn(AdaMerging(steps=60, lr=0.01), [doubles(w=[1.0])], distance([-5.0]))
    assert merger.coefficients["w"].tolist() == [0.0]
    learn(merger, [doubles(w=[0.0])], distance([0.2]))
    assert merger.coefficients["w"][0] == pytest.approx(0.2, abs=0.02)
    free = learn(AdaMerging(steps=60, lr=0.01, clip=False), [doubles(w=[1.0])], distance([-5.0]))
    assert free.coefficients["w"][0] < -0.2


def test_granularity_is_the_number_of_coefficients():
    vector = {"a": torch.ones(2), "b": torch.ones(3)}
    assert {k: v.shape for k, v in learn(AdaMerging(steps=0), [vector] * 2, None).coefficients.items()} == {
        "a": (2,),
        "b": (2,),
    }
    assert list(learn(AdaMerging(granularity="task", steps=0), [vector], None).coefficients) == ["all"]


def test_the_latest_vector_alone():
    vectors = [doubles(w=[1.0, 0.0]), doubles(w=[0.0, 1.0])]
    merger = learn(AdaMerging(latest_only=True, steps=0), vectors, None)
    assert merger.compute()["w"].tolist() == pytest.approx([0, 0.3])
    assert merger.num_tasks == 2
