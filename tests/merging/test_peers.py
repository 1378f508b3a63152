"""The rules next to those of PEFT and mergekit, where these packages are installed; skipped where they are not.

Random rules are given one mask: ``torch.bernoulli``, which both packages draw from, returns that of clmerge instead.
"""

import pytest
import torch
from torch.testing import assert_close

from clmerge.merging import (
    DARE,
    DELLA,
    SLERP,
    TIES,
    Breadcrumbs,
    BreadcrumbsMask,
    ModelStock,
    Pipeline,
    TaskArithmetic,
    TrimTensor,
    WeightAverage,
    WeightedAverage,
)
from clmerge.seeds import seeded_uniform
from clmerge.weights.task_vector import apply_task_vector, task_vector

pytestmark = pytest.mark.peers

TASKS = range(3)
SHAPES = {"weight": (16, 24), "bias": (40,), "kernel": (8, 4, 3, 3)}
# Parameters are of order 1 and task vectors of order 0.1, so both are some roundings of a parameter.
TOLERANCE = {torch.float32: {"rtol": 0.0, "atol": 1e-6}, torch.float64: {"rtol": 0.0, "atol": 1e-14}}


@pytest.fixture
def peft():
    # importorskip keeps the warnings of an import to itself.
    return pytest.importorskip("peft.utils.merge_utils")


@pytest.fixture
def mergekit():
    return pytest.importorskip("mergekit.merge_methods")


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


def make_models(dtype, *, shapes=SHAPES, common=0.0):
    """A base and its fine-tuned models; ``common`` is the size of what these share."""
    generator = torch.Generator().manual_seed(0)

    def draw():
        return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}

    base, shared = draw(), draw()
    noises = [draw() for _ in TASKS]
    return base, [{name: base[name] + 0.1 * noise[name] + common * shared[name] for name in base} for noise in noises]


def vectors_of(base, models):
    return [task_vector(model, base) for model in models]


def merged(merger, vectors):
    for vector in vectors:
        merger.update(vector)
    return merger.compute()


def merged_model(merger, base, models):
    return apply_task_vector(base, merged(merger, vectors_of(base, models)))


def by_mergekit(mergekit, method, base, models, **parameters):
    if method not in ("model_stock", "slerp"):
        parameters = {"weight": 1.0} | parameters
    states = {"base": base} | dict(enumerate(models))
    return mergekit.merge_state_dicts(states, method, base="base", parameters=parameters)


def share_masks(monkeypatch, uniforms, keep):
    """Let ``torch.bernoulli`` draw ``keep(uniform, probabilities)`` from these numbers, in this order."""
    left = list(uniforms)

    def bernoulli(probabilities):
        return keep(left.pop(0).view_as(probabilities), probabilities).to(probabilities.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    return left


def drop_numbers(vectors, names, purpose="drop"):
    return [
        seeded_uniform(vector[name], seed=0, task=task, name=name, purpose=purpose)
        for name in names
        for task, vector in enumerate(vectors)
    ]


def keep_above(uniform, probabilities):
    return uniform >= 1 - probabilities


# PEFT's kernels: one tensor of task vectors at a time, one weight per task.


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_peft_ties(peft, dtype, density):
    """``TIES(density, trim="tensor")``: PEFT trims tensor by tensor, and the sign of a zero sum is +."""
    vectors = vectors_of(*make_models(dtype))
    ours = merged(TIES(density, trim="tensor"), vectors)
    for name in SHAPES:
        theirs = peft.ties([vector[name] for vector in vectors], torch.ones(len(vectors), dtype=dtype), density)
        assert_close(ours[name], theirs, **TOLERANCE[dtype])


def test_peft_ties_takes_zero_sums_as_positive(peft):
    """``trim="tensor"`` again; with ``trim="model"`` the sign most entries have would decide, here -."""
    tensors = [torch.tensor([2.0, -5.0, -9.0, 0.1]), torch.tensor([-2.0, -6.0, -7.0, 0.1])]
    ours = merged(TIES(0.75, trim="tensor"), [{"w": tensor} for tensor in tensors])["w"]
    assert_close(ours, peft.ties(tensors, torch.ones(2), 0.75), rtol=0, atol=0)
    assert ours[0] == 2
    assert merged(TIES(0.75), [{"w": tensor} for tensor in tensors])["w"][0] == -2


def test_peft_weighs_what_agrees_and_divides_by_its_number(peft, dtype):
    """``TIES(scale=w)`` for one weight w of all tasks. There is no option for different ones."""
    vectors = vectors_of(*make_models(dtype))
    ours = merged(TIES(0.5, trim="tensor", scale=0.7), vectors)
    for name in SHAPES:
        theirs = peft.ties([vector[name] for vector in vectors], torch.full((3,), 0.7, dtype=dtype), 0.5)
        assert_close(ours[name], theirs, **TOLERANCE[dtype])


def test_peft_task_arithmetic(peft, dtype):
    """``TaskArithmetic(scale=1, weights=...)``."""
    vectors, weights = vectors_of(*make_models(dtype)), [0.5, -1.0, 2.0]
    ours = merged(TaskArithmetic(1.0, weights=weights), vectors)
    for name in SHAPES:
        theirs = peft.task_arithmetic([vector[name] for vector in vectors], torch.tensor(weights, dtype=dtype))
        assert_close(ours[name], theirs, **TOLERANCE[dtype])


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_peft_magnitude_prune(peft, dtype, density):
    """``Pipeline(TaskArithmetic(1, weights=...), sparsifier=TrimTensor(density))``."""
    vectors, weights = vectors_of(*make_models(dtype)), [0.5, -1.0, 2.0]
    ours = merged(Pipeline(TaskArithmetic(1.0, weights=weights), sparsifier=TrimTensor(density)), vectors)
    for name in SHAPES:
        tensors = [vector[name] for vector in vectors]
        theirs = peft.magnitude_prune(tensors, torch.tensor(weights, dtype=dtype), density)
        assert_close(ours[name], theirs, **TOLERANCE[dtype])


def test_peft_prunes_tiny_tensors_to_nothing(peft):
    """No option: of 3 entries at density 0.2 PEFT keeps ``int(0.6)``, ``TrimTensor`` and mergekit at least one."""
    tau = torch.tensor([1.0, -3.0, 2.0])
    assert peft.magnitude_prune([tau], torch.ones(1), 0.2).tolist() == [0, 0, 0]
    assert TrimTensor(0.2)({"w": tau})["w"].tolist() == [0, -3, 0]


@pytest.mark.parametrize(
    ("kernel", "reducer"),
    [("dare_linear", TaskArithmetic(1.0)), ("dare_ties", TIES(1.0, trim="tensor"))],
)
def test_peft_dare_with_the_same_masks(peft, dtype, monkeypatch, kernel, reducer):
    """``DARE(rescale="probability", reducer=...)``, the default of rescale; the reducer of TIES trims nothing."""
    vectors = vectors_of(*make_models(dtype))
    ours = merged(DARE(0.75, rescale="probability", reducer=reducer), vectors)
    left = share_masks(monkeypatch, drop_numbers(vectors, SHAPES), keep_above)
    for name in SHAPES:
        tensors = [vector[name] for vector in vectors]
        theirs = getattr(peft, kernel)(tensors, torch.ones(len(tensors), dtype=dtype), 0.25)
        assert_close(ours[name], theirs, **TOLERANCE[dtype])
    assert not left


# mergekit: whole models in memory.


@pytest.mark.parametrize(("normalize", "merge"), [(True, "mean"), (False, "sum")])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_mergekit_ties(mergekit, dtype, density, normalize, merge):
    """``TIES(density, trim="tensor", merge=..., scale=...)``: lambda is scale, normalize is ``merge="mean"``."""
    base, models = make_models(dtype, shapes=SHAPES | {"scalar": (), "tiny": (3,)})
    ours = merged_model(TIES(density, trim="tensor", merge=merge, scale=0.8), base, models)
    parameters = {"density": density, "normalize": normalize, "lambda": 0.8}
    theirs = by_mergekit(mergekit, "ties", base, models, **parameters)
    assert_close(ours, theirs, **TOLERANCE[dtype])


def test_mergekit_ties_takes_zero_sums_as_positive(mergekit):
    """``trim="tensor"``; with ``trim="model"`` the sign most entries have would decide, here -."""
    models = [{"w": torch.tensor([2.0, -5.0, -9.0, 0.1])}, {"w": torch.tensor([-2.0, -6.0, -7.0, 0.1])}]
    theirs = by_mergekit(mergekit, "ties", {"w": torch.zeros(4)}, models, density=0.75)
    assert_close(merged(TIES(0.75, trim="tensor"), models), theirs, rtol=0, atol=0)
    assert theirs["w"][0] == 2
    assert merged(TIES(0.75), models)["w"][0] == -2


def test_mergekit_task_arithmetic(mergekit, dtype):
    """``TaskArithmetic(scale, weights=...)``: lambda is scale; with normalize and equal weights ``WeightAverage``."""
    base, models = make_models(dtype)
    weights = [0.5, -1.0, 2.0]
    parameters = {"weight": dict(enumerate(weights)), "lambda": 0.4}
    theirs = by_mergekit(mergekit, "task_arithmetic", base, models, **parameters)
    assert_close(merged_model(TaskArithmetic(0.4, weights=weights), base, models), theirs, **TOLERANCE[dtype])
    theirs = by_mergekit(mergekit, "task_arithmetic", base, models, normalize=True)
    assert_close(merged_model(WeightAverage(), base, models), theirs, **TOLERANCE[dtype])


def test_mergekit_linear(mergekit, dtype):
    """``WeightAverage()``, or ``WeightedAverage(by="given", weights=...)``; mergekit averages models without a base."""
    base, models = make_models(dtype)
    theirs = mergekit.merge_state_dicts(models, "linear", parameters={"weight": 1.0})
    assert_close(merged_model(WeightAverage(), base, models), theirs, **TOLERANCE[dtype])
    theirs = mergekit.merge_state_dicts(models, "linear", parameters={"weight": [1.0, 2.0, 5.0]})
    given = WeightedAverage(by="given", weights=[0.125, 0.25, 0.625])
    assert_close(merged_model(given, base, models), theirs, **TOLERANCE[dtype])


@pytest.mark.parametrize("t", [None, 0.2])
def test_mergekit_slerp_of_task_vectors(mergekit, dtype, t):
    """``SLERP(t)``, whose ends are task vectors, so mergekit is given these for models; the n-th at t or ``1 / n``."""
    vectors = vectors_of(*make_models(dtype))
    theirs = vectors[0]
    for count, vector in enumerate(vectors[1:], start=2):
        parameters = {"t": 1 / count if t is None else t}
        theirs = mergekit.merge_state_dicts([theirs, vector], "slerp", base=0, parameters=parameters)
    assert_close(merged(SLERP(t), vectors), theirs, **TOLERANCE[dtype])


@pytest.mark.parametrize("sign", [1, -1])
def test_mergekit_slerp_of_parallel_ends(mergekit, dtype, sign):
    """No option needed: beyond a cosine of 0.9995, either way, both interpolate linearly."""
    tau = vectors_of(*make_models(dtype))[0]
    vectors = [tau, {name: 3 * sign * tensor for name, tensor in tau.items()}]
    theirs = mergekit.merge_state_dicts(vectors, "slerp", base=0, parameters={"t": 0.3})
    assert_close(merged(SLERP(0.3), vectors), theirs, **TOLERANCE[dtype])


def test_mergekit_nuslerp(mergekit, dtype):
    """``SLERP(t)`` for two models: with a base NuSLERP interpolates task vectors; t is the second's share of weight."""
    base, models = make_models(dtype)
    theirs = by_mergekit(mergekit, "nuslerp", base, models[:2], weight={0: 3.0, 1: 1.0})
    assert_close(merged_model(SLERP(0.25), base, models[:2]), theirs, **TOLERANCE[dtype])


def test_mergekit_model_stock(mergekit, dtype):
    """``ModelStock()`` and ``filter_wise=False``, both defaults, where the mean cosine is positive."""
    base, models = make_models(dtype, common=0.1)
    theirs = by_mergekit(mergekit, "model_stock", base, models)
    assert_close(merged_model(ModelStock(), base, models), theirs, **TOLERANCE[dtype])


def test_mergekit_model_stock_walks_backwards_at_negative_cosines(mergekit):
    """No option: at a mean cosine of -0.2 the formula gives a ratio of -1, ``ModelStock`` takes the cosine for 0."""
    models = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([-0.6, 0.8])}, {"w": torch.tensor([0.0, 0.0])}]
    base = {"w": torch.zeros(2)}
    theirs = by_mergekit(mergekit, "model_stock", base, models)
    # mergekit's mean is over three pairs, two of them with a vector of no direction: cos = -0.6 / 3.
    assert_close(theirs["w"], -(models[0]["w"] + models[1]["w"]) / 3, rtol=1e-5, atol=1e-6)
    assert merged(ModelStock(), models)["w"].tolist() == [0, 0]


@pytest.mark.parametrize("rule", ["breadcrumbs", "breadcrumbs_ties"])
def test_mergekit_breadcrumbs(mergekit, dtype, rule):
    """``Breadcrumbs(beta, gamma, scale)`` at density ``1 - beta - gamma`` where the shares are whole numbers.

    With signs: ``Pipeline(TIES(1, trim="tensor", merge="sum"), sparsifier=BreadcrumbsMask(beta, gamma))``.
    """
    base, models = make_models(dtype)
    if rule == "breadcrumbs":
        merger = Breadcrumbs(beta=0.5, gamma=0.125, scale=0.6)
    else:
        reducer = TIES(1.0, trim="tensor", merge="sum", scale=0.6)
        merger = Pipeline(reducer, sparsifier=BreadcrumbsMask(beta=0.5, gamma=0.125))
    parameters = {"density": 0.375, "gamma": 0.125, "lambda": 0.6}
    theirs = by_mergekit(mergekit, rule, base, models, **parameters)
    assert_close(merged_model(merger, base, models), theirs, **TOLERANCE[dtype])


def test_mergekit_breadcrumbs_rounds_down_what_it_keeps(mergekit):
    """No option: ``BreadcrumbsMask`` rounds both shares it drops down, so it keeps more of small tensors."""
    tau = {"w": torch.tensor([1.0, -4.0, 3.0, 2.0, 5.0])}
    parameters = {"density": 0.375, "gamma": 0.125}
    theirs = by_mergekit(mergekit, "breadcrumbs", {"w": torch.zeros(5)}, [tau], **parameters)
    assert theirs["w"].tolist() == [0, 0, 0, 0, 5]
    assert BreadcrumbsMask(beta=0.5, gamma=0.125)(tau)["w"].tolist() == [0, -4, 3, 0, 5]


@pytest.mark.parametrize(
    ("rule", "reducer"),
    [("dare_linear", TaskArithmetic(0.7)), ("dare_ties", TIES(1.0, trim="tensor", merge="sum", scale=0.7))],
)
def test_mergekit_dare_with_the_same_masks(mergekit, monkeypatch, rule, reducer):
    """``DARE(rescale="l1", reducer=...)``; TIES trims nothing and has ``merge="sum"``, for normalize is off here."""
    base, models = make_models(torch.float32)
    vectors = vectors_of(base, models)
    ours = merged_model(DARE(0.75, rescale="l1", reducer=reducer), base, models)
    left = share_masks(monkeypatch, drop_numbers(vectors, SHAPES), keep_above)
    theirs = by_mergekit(mergekit, rule, base, models, **{"density": 0.25, "lambda": 0.7})
    assert not left
    assert_close(ours, theirs, **TOLERANCE[torch.float32])


def test_mergekit_dare_without_rescaling_with_the_same_masks(mergekit, monkeypatch):
    """``DARE(rescale="none")``. mergekit cannot divide by the probability, which is the default here."""
    base, models = make_models(torch.float32)
    ours = merged_model(DARE(0.75, rescale="none", scale=1.0), base, models)
    left = share_masks(monkeypatch, drop_numbers(vectors_of(base, models), SHAPES), keep_above)
    theirs = by_mergekit(mergekit, "dare_linear", base, models, density=0.25, rescale=False)
    assert not left
    assert_close(ours, theirs, **TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("rule", "reducer"),
    [("della_linear", TaskArithmetic(0.7)), ("della", TIES(1.0, trim="tensor", scale=0.7))],
)
def test_mergekit_della_with_the_same_numbers(mergekit, monkeypatch, rule, reducer):
    """``DELLA(1 - density, window=2 * epsilon, rescale="l1")`` for matrices and vectors, from the same uniform numbers.

    Of tensors of more dimensions mergekit ranks the second, DELLA the last one.
    """
    base, models = make_models(torch.float32, shapes={"weight": (16, 24), "bias": (40,)})
    vectors = vectors_of(base, models)
    ours = merged_model(DELLA(0.4, window=0.3, rescale="l1", reducer=reducer), base, models)
    left = share_masks(monkeypatch, drop_numbers(vectors, base, purpose="della"), torch.lt)
    theirs = by_mergekit(mergekit, rule, base, models, **{"density": 0.6, "epsilon": 0.15, "lambda": 0.7})
    assert not left
    assert_close(ours, theirs, **TOLERANCE[torch.float32])
