"""What all rules that learn have in common: the derivative, the state, what is refused."""

import copy

import pytest
import torch
from support.learning import distance, doubles, gradients_of, learn

from clmerge.merging import (
    ATLAS,
    AdaMerging,
    AdaRank,
    ConcreteMask,
    HyperplaneSoup,
    Learned,
    LearnedSoup,
    Pipeline,
    Scale,
    TrajectorySoup,
    ZipMerge,
)
from clmerge.merging.learned.learned import Moment
from clmerge.weights import BankVector, TaskVectorBank

RULES = {
    "AdaMerging": lambda: AdaMerging(steps=6, lr=0.05),
    "AdaMerging task-wise": lambda: AdaMerging(granularity="task", steps=6, lr=0.05),
    "AdaMerging++": lambda: AdaMerging(elect=True, steps=6, lr=0.05),
    "AdaMerging latest": lambda: AdaMerging(latest_only=True, steps=6, lr=0.05),
    "ATLAS": lambda: ATLAS(steps=6, lr=0.05),
    "LearnedSoup": lambda: LearnedSoup(steps=6),
    "HyperplaneSoup": lambda: HyperplaneSoup(steps=6),
    "TrajectorySoup": lambda: TrajectorySoup(steps=6, lr=0.5),
    "ConcreteMask": lambda: ConcreteMask(steps=6, lr=0.5, learn_scale=True),
    "AdaRank": lambda: AdaRank(steps=6, lr=0.05, include=["*.weight"]),
    "ZipMerge": lambda: ZipMerge(steps=6, lr=0.05),
}
SHAPES = {"0.weight": (6, 4), "0.bias": (6,), "2.weight": (3, 6), "2.bias": (3,)}
IMAGES = torch.randn(20, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def random_vector(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}


BASE = random_vector(100)
VECTORS = [random_vector(seed, 0.5) for seed in range(3)]


def entropy(vector, objective, tasks):
    """The mean entropy of a network of two layers, by all parts of its weights."""
    weights = {name: BASE[name] + tau for name, tau in vector.items()}
    hidden = torch.tanh(torch.nn.functional.linear(IMAGES, weights["0.weight"], weights["0.bias"]))
    log_p = torch.nn.functional.linear(hidden, weights["2.weight"], weights["2.bias"]).log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1).mean()


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("label", RULES)
def test_the_derivative_is_that_of_the_whole_graph(label):
    """One gradient by the weights, carried on parameter by parameter, against backpropagation through everything."""
    merger = learn(RULES[label](), VECTORS[:2], entropy)
    twin = copy.deepcopy(merger)
    merger.update(VECTORS[2], gradients=gradients_of(entropy))

    def taus(name):
        return [vector[name] for vector in (VECTORS if not twin.latest_only else VECTORS[2:])]

    if label == "AdaMerging++":
        trimmed = [twin._sparsified(vector, 0) for vector in VECTORS]
        taus = lambda name: [vector[name] for vector in trimmed]  # noqa: E731
    count = len(taus("0.bias"))
    leaves = twin._started(SHAPES, count)
    if twin.warm_starts:
        leaves |= {name: twin._warmed(tensor, leaves[name]) for name, tensor in twin._coefficients.items()}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    optimizer = twin._optimizer(list(leaves.values()))
    with torch.no_grad():
        survey = twin._survey(list(SHAPES), taus)
    for number in range(6):
        moment = Moment(number, 2, survey)
        loss = entropy({n: twin._combine(n, taus(n), leaves, moment) for n in SHAPES}, None, [])
        if (penalty := twin._penalty(leaves)) is not None:
            loss = loss + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            twin._project(leaves)
    for name, tensor in merger.coefficients.items():
        torch.testing.assert_close(tensor, leaves[name].detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("label", [label for label in RULES if label != "ConcreteMask"])  # at every step another mask
def test_learning_lowers_the_loss(label):
    merger = RULES[label]()
    learn(merger, VECTORS, entropy)
    assert merger.losses["last"] < merger.losses["first"]


@pytest.mark.parametrize("label", RULES)
def test_a_resumed_stream_has_the_same_bits(label):
    straight = learn(RULES[label](), VECTORS, entropy)
    first, resumed = learn(RULES[label](), VECTORS[:2], entropy), RULES[label]()
    resumed.load_state_dict(first.state_dict())
    resumed.update(VECTORS[2], gradients=gradients_of(entropy))
    assert_same_bits(resumed.coefficients, straight.coefficients)
    assert_same_bits(resumed.compute(), straight.compute())
    assert resumed.losses == straight.losses


@pytest.mark.parametrize("label", RULES)
def test_vectors_in_a_bank_give_the_same_bits(label, tmp_path):
    bank, merger = TaskVectorBank(tmp_path), RULES[label]()
    for task, vector in enumerate(VECTORS):
        bank.append(task, vector)
        merger.update(BankVector(bank, task), gradients=gradients_of(entropy))
    assert_same_bits(merger.compute(), learn(RULES[label](), VECTORS, entropy).compute())


@pytest.mark.parametrize("label", RULES)
def test_what_is_said_of_the_state_is_what_is_held(label):
    merger = learn(RULES[label](), VECTORS, entropy)
    in_memory = sum(tau.nbytes for tau in VECTORS[0].values()) * 3
    said = RULES[label]().state_size(SHAPES, 3)
    learned = sum(tensor.nbytes for tensor in merger.coefficients.values())
    assert said == in_memory // 2 + learned  # sizes are of float32, the vectors float64


def test_coefficients_go_on_from_those_of_the_tasks_before():
    merger = learn(AdaMerging(steps=40, lr=0.01), [doubles(w=[1.0, 0.0])], distance([0.6, 0.0]))
    before = merger.coefficients["w"]
    assert float(before[0]) == pytest.approx(0.6, abs=0.02)
    idle = AdaMerging(steps=0, lr=0.01)
    idle.load_state_dict(merger.state_dict() | {"settings": idle.settings()})
    idle.update(doubles(w=[0.0, 1.0]), gradients=gradients_of(distance([0.0, 0.0])))
    assert idle.coefficients["w"].tolist() == [float(before[0]), 0.3]


def test_the_tasks_and_the_experts_of_a_request_are_those_of_the_vectors():
    asked = []

    def gradients(objective, tasks, *, seed, expert):
        asked.append((list(tasks), seed, [float(expert(task)["w"]) for task in tasks]))
        return lambda vector: (0.0, {})

    for options in ({}, {"latest_only": True}):
        merger = AdaMerging(steps=1, seed=7, **options)
        for task, value in ((4, 1.0), (2, 5.0)):
            merger.update({"w": torch.tensor(value)}, task=task, gradients=gradients)
    assert asked == [([4], 7, [1.0]), ([4, 2], 7, [1.0, 5.0]), ([4], 7, [1.0]), ([2], 7, [5.0])]


def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was():
    merger = learn(AdaMerging(steps=3), [{"w": torch.ones(2)}], lambda vector, *_: vector["w"].sum())
    before = merger.state_dict()
    with pytest.raises(ValueError, match=r"expected a finite loss .* got nan at step 1 after task 1; lower lr"):
        merger.update({"w": torch.ones(2)}, gradients=gradients_of(lambda vector, *_: vector["w"].sum() * torch.nan))
    assert repr(merger.state_dict()) == repr(before)


def test_what_cannot_be_learned_is_refused():
    with pytest.raises(ValueError, match="expected gradients on adaptation images for AdaMerging"):
        AdaMerging().update({"w": torch.ones(2)})
    with pytest.raises(ValueError, match="expected no finisher after AdaMerging"):
        Pipeline(AdaMerging(), finisher=Scale(2.0))
    with pytest.raises(ValueError, match="learning rate above 0"):
        AdaMerging(lr=0.0)
    with pytest.raises(ValueError, match="steps"):
        AdaMerging(steps=-1)
    with pytest.raises(TypeError, match="take tasks out"):
        learn(AdaMerging(steps=0), [{"w": torch.ones(2)}], None).downdate({"w": torch.ones(2)})


def test_labels_are_read_only_where_the_objective_reads_them():
    assert not AdaMerging().reads_labels
    assert ATLAS().reads_labels
    assert Pipeline(ATLAS()).reads_labels
    assert Pipeline(ATLAS()).requires_gradient


def test_the_base_class_is_no_rule():
    with pytest.raises(TypeError, match="abstract"):
        Learned(objective=None, steps=1, lr=0.1)
