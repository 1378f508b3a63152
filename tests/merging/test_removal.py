"""Taking tasks out: exact to the stated bound, or refused; never silently wrong."""

import numpy as np
import pytest
import torch
from support.merger_cases import CASES
from support.references import statistics_of

from clmerge.merging import Fisher, MetaGPT, RegMean, TaskArithmetic, WeightedAverage
from clmerge.merging.removal import TOLERANCE

REMOVABLE = [label for label, case in CASES.items() if case.build().removable]
SHAPES = {"matrix": (4, 5), "bias": (5,), "empty": (0, 3)}


def vector(seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def beside(tau, task):
    return statistics_of(task, {name: tuple(tensor.shape) for name, tensor in tau.items()})


def removed(merger, tau, task):
    """Take a task out; return the message if that is refused."""
    try:
        merger.downdate(tau, task=task, statistics=beside(tau, task))
    except ValueError as error:
        return str(error)
    return ""


def expected(label, vectors):
    arrays = [{name: tensor.double().numpy() for name, tensor in vectors[task].items()} for task in vectors]
    return CASES[label].batch(arrays, list(vectors))


def assert_within_the_bound(label, merger, vectors):
    """Compare with the batch rule over what is left, relative to its largest entry and that of the vectors' mean."""
    reference = expected(label, vectors)
    mean = {name: sum(tau[name].double().numpy() for tau in vectors.values()) / len(vectors) for name in reference}
    largest = max(np.abs(array).max(initial=0.0) for arrays in (reference, mean) for array in arrays.values())
    # Adam's steps have one length: rounding of a gradient near zero turns whole steps around.
    steps = 2 * merger.lr * merger.steps if label == "WUDI" else 0.0
    for name, tensor in merger.compute().items():
        difference = np.abs(tensor.double().numpy() - reference[name]).max(initial=0.0)
        assert difference <= 10 * TOLERANCE * CASES[label].condition * largest + steps, name


@pytest.mark.parametrize("label", REMOVABLE)
@pytest.mark.parametrize("decade", range(0, 10, 3))
def test_what_was_added_is_taken_out_over_decades_of_magnitudes(label, decade):
    merger, vectors = CASES[label].build(), {0: vector(0), 1: vector(1), 2: vector(2, 10.0**decade)}
    for task, tau in vectors.items():
        merger.update(tau, task=task, statistics=beside(tau, task))
    before = str(merger.state_dict())
    refused = removed(merger, vectors[2], 2)
    if refused:
        assert "merge the other tasks anew" in refused
        assert decade > 0, "equal vectors can be taken out"
        assert str(merger.state_dict()) == before
    else:
        assert merger.tasks == (0, 1)
        assert_within_the_bound(label, merger, {task: vectors[task] for task in (0, 1)})


@pytest.mark.parametrize("label", REMOVABLE)
def test_a_hundred_random_additions_and_removals(label):
    generator = np.random.default_rng(0)
    merger, vectors, refused = CASES[label].build(), {}, 0
    for task in range(100):
        if vectors and (len(vectors) >= 6 or generator.random() < 0.5):
            gone = int(generator.choice(list(vectors)))
            if removed(merger, vectors[gone], gone):
                refused += 1
                if refused % 5:  # else a new start, as the message advises
                    continue
                merger = CASES[label].build()
                for kept in vectors.keys() - {gone}:
                    merger.update(vectors[kept], task=kept, statistics=beside(vectors[kept], kept))
                vectors = {kept: vectors[kept] for kept in merger.tasks}
            else:
                del vectors[gone]
        else:
            index = task % CASES_WITH_SETTINGS if label_has_settings(label) else task
            if index in vectors:
                continue
            vectors[index] = vector(task, 10.0 ** generator.uniform(-1, 1))
            merger.update(vectors[index], task=index, statistics=beside(vectors[index], index))
        assert merger.tasks == tuple(vectors)
        if vectors:
            assert_within_the_bound(label, merger, vectors)
    assert refused < 60


CASES_WITH_SETTINGS = 3


def label_has_settings(label):
    """Whether the case has settings for few tasks alone, such as weights."""
    merger = CASES[label].build()
    return any(isinstance(getattr(merger, name), list) for name in merger.per_task)


def test_information_over_decades_is_refused_instead_of_wrong():
    merger, ones = Fisher(), {"w": torch.ones(3)}
    for task, information in enumerate((1e-8, 1e-4, 1.0)):
        given = {"fisher": {"w": torch.full((3,), information)}}
        merger.update({"w": ones["w"] * (task + 1)}, task=task, statistics=given)
    with pytest.raises(ValueError, match="task 2 so much larger"):
        merger.downdate({"w": ones["w"] * 3}, task=2, statistics={"fisher": {"w": torch.ones(3)}})
    assert merger.tasks == (0, 1, 2)


def test_norms_over_decades_are_refused_instead_of_wrong():
    merger = MetaGPT()
    vectors = [{"w": torch.full((4,), norm / 2)} for norm in (900.0, 30.0, 1.0)]
    for tau in vectors:
        merger.update(tau)
    with pytest.raises(ValueError, match="merge the other tasks anew"):
        merger.downdate(vectors[0])
    assert merger.num_tasks == 3


def test_a_sum_after_a_vector_a_million_times_larger_is_refused():
    merger = TaskArithmetic(1.0)
    for tau in (vector(0), vector(1, 1e6)):
        merger.update(tau)
    with pytest.raises(ValueError, match="merge the other tasks anew"):
        merger.downdate(vector(1, 1e6))


def test_what_is_left_of_zero_vectors_is_zero():
    for merger in (TaskArithmetic(), MetaGPT(), WeightedAverage("inverse_norm")):
        zero, tau = {"w": torch.zeros(3)}, {"w": torch.tensor([0.1, 0.2, 0.3])}
        merger.update(zero)
        merger.update(tau)
        merger.downdate(tau)
        assert merger.compute()["w"].tolist() == [0.0, 0.0, 0.0]


def test_statistics_are_part_of_what_was_merged():
    merger, tau = RegMean(), {"w": torch.ones(2, 2)}
    for task in range(2):
        merger.update(tau, task=task, statistics={"gram": {"w": torch.eye(2) * (task + 1)}})
    with pytest.raises(ValueError, match="statistics of task 0"):
        merger.downdate(tau, task=0, statistics={"gram": {"w": torch.eye(2) * 7}})
    merger.downdate(tau, statistics={"gram": {"w": torch.eye(2)}})
    assert merger.tasks == (1,)
