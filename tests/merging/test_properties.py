"""What holds for every registered rule, and for whatever rule is added later."""

import copy
import inspect
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.merger_cases import CASES, own_rules
from support.references import gradients, score, statistics_of

from clmerge.merging import GreedySoup

SHAPES = {"matrix": (4, 5), "bias": (5,), "scalar": (), "one": (1,), "empty": (0, 3)}
ORDER_FREE = [label for label, case in CASES.items() if case.build().order_free]

quick = settings(max_examples=12, deadline=None, derandomize=True, database=None)
each_case = pytest.mark.parametrize("label", CASES)
each_order_free_case = pytest.mark.parametrize("label", ORDER_FREE)


@st.composite
def streams(draw, max_tasks=5):
    """Task vectors of small multiples of 1/8: many ties and zero sums, and no rounding in sums."""
    num_tasks = draw(st.integers(1, max_tasks))
    largest = draw(st.sampled_from([0, 1, 8]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [
        {
            name: torch.from_numpy(np.asarray(generator.integers(-largest, largest + 1, shape) / 8)).float()
            for name, shape in SHAPES.items()
        }
        for _ in range(num_tasks)
    ]


def normal_streams(num_tasks=4, seed=0):
    """Task vectors without ties."""
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(num_tasks)]


def suited(label, vectors):
    """Add exact multiples of 1/1024 without ties where the rule asks for generic data; sums still do not round."""
    if not CASES[label].generic:
        return vectors
    seed = int(sum(tensor.sum() for vector in vectors for tensor in vector.values()) * 8) % 2**32
    return [
        {name: tensor + (1024 * other[name]).round() / 1024 for name, tensor in vector.items()}
        for vector, other in zip(vectors, normal_streams(len(vectors), seed), strict=True)
    ]


def fold(merger, vectors, tasks=None):
    for index, vector in enumerate(vectors):
        task = merger.num_tasks if tasks is None else tasks[index]
        statistics = statistics_for(vector, task)
        merger.update(vector, task=task, score=score, gradients=gradients, statistics=statistics)
    return merger


def statistics_for(vector, task):
    return statistics_of(task, {name: tuple(tensor.shape) for name, tensor in vector.items()})


def expected(label, vectors, tasks=None):
    arrays = [{name: tensor.double().numpy() for name, tensor in vector.items()} for vector in vectors]
    return CASES[label].batch(arrays, list(range(len(vectors))) if tasks is None else tasks)


def close(label, tolerance=2e-6):
    return tolerance * CASES[label].condition


def assert_close(vector, reference, tolerance=2e-6):
    assert vector.keys() == reference.keys()
    for name, tensor in vector.items():
        np.testing.assert_allclose(
            np.asarray(tensor, dtype=np.float64),
            reference[name],
            rtol=tolerance,
            atol=tolerance,
            err_msg=name,
        )


def assert_same_bits(left, right):
    """Compare nested states; tensors must be equal in every bit but the sign of zero."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same_bits(left[key], right[key])
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    else:
        assert left == right


def tensors_in(state):
    if isinstance(state, torch.Tensor):
        return [state]
    return [tensor for value in state.values() for tensor in tensors_in(value)] if isinstance(state, dict) else []


def home_of(rule):
    """The test file in which a rule's cases belong."""
    *folders, name = rule.__module__.split(".")[1:]
    return "/".join(["tests", *folders, f"test_{name}.py"])


def test_every_registered_rule_has_a_reference():
    tested = {type(case.build()).__name__ for case in CASES.values()}
    places = [home_of(rule) for name, rule in own_rules().items() if name not in tested]
    assert tested == set(own_rules()), f"add a batch form and CASES = {{label: Case(...)}} to {places}"


def test_the_place_of_a_case_is_the_test_file_of_the_rule():
    assert home_of(GreedySoup) == "tests/merging/linear/test_soup.py"


@each_case
@quick
@given(vectors=streams())
def test_stream_equals_batch_at_every_task(label, vectors):
    merger = CASES[label].build()
    vectors = suited(label, vectors)
    for count, vector in enumerate(vectors, start=1):
        fold(merger, [vector])
        assert merger.num_tasks == count
        assert_close(merger.compute(), expected(label, vectors[:count]), close(label))


@each_case
def test_stream_equals_batch_on_tensors_of_many_blocks(label, monkeypatch):
    monkeypatch.setattr("clmerge.merging.blocks.CPU_BLOCK", 100)
    generator = torch.Generator().manual_seed(1)
    vectors = [{"w": torch.randn(30, 100, generator=generator)} for _ in range(3)]
    assert_close(fold(CASES[label].build(), vectors).compute(), expected(label, vectors), close(label))


@each_case
def test_float64_stays_float64(label):
    vectors = [{name: tensor.double() for name, tensor in vector.items()} for vector in normal_streams()]
    merged = fold(CASES[label].build(), vectors).compute()
    assert {tensor.dtype for tensor in merged.values()} == {torch.float64}
    assert_close(merged, expected(label, vectors), close(label, 1e-12))


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(label, dtype):
    halves = [{name: tensor.to(dtype) for name, tensor in vector.items()} for vector in normal_streams()]
    floats = [{name: tensor.float() for name, tensor in vector.items()} for vector in halves]
    merged = fold(CASES[label].build(), halves).compute()
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    assert_same_bits(merged, fold(CASES[label].build(), floats).compute())


@each_case
def test_non_contiguous_tensors_are_read_right(label):
    plain = [{"w": torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]
    strided = [{"w": vector["w"].t().contiguous().t()} for vector in plain]
    assert not strided[0]["w"].is_contiguous()
    assert_same_bits(fold(CASES[label].build(), strided).compute(), fold(CASES[label].build(), plain).compute())


@each_case
def test_zero_vectors_merge_to_zero(label):
    zeros = [{name: torch.zeros(shape) for name, shape in SHAPES.items()}] * 3
    assert all(not tensor.any() for tensor in fold(CASES[label].build(), zeros).compute().values())


@pytest.mark.parametrize("label", [label for label, case in CASES.items() if case.homogeneous])
@quick
@given(vectors=streams(), factor=st.sampled_from([0.25, 2.0, 1024.0]))
def test_scaling_all_vectors_scales_the_result(label, vectors, factor):
    vectors = suited(label, vectors)
    scaled = [{name: factor * tensor for name, tensor in vector.items()} for vector in vectors]
    merged = fold(CASES[label].build(), vectors).compute()
    assert_close(
        {name: tensor / factor for name, tensor in fold(CASES[label].build(), scaled).compute().items()},
        {name: tensor.numpy() for name, tensor in merged.items()},
        close(label),
    )


@each_order_free_case
@quick
@given(order=st.permutations(range(5)), seed=st.integers(0, 100))
def test_order_of_tasks_does_not_matter_without_ties(label, order, seed):
    vectors = normal_streams(num_tasks=5, seed=seed)
    shuffled = fold(CASES[label].build(), [vectors[task] for task in order], tasks=order)
    assert_close(shuffled.compute(), expected(label, vectors), close(label))


def on_a_grid(vectors):
    """Round as a checkpoint in bfloat16 does, of weights around 0.5: equal magnitudes of both signs become common."""
    return [
        {name: (0.5 + tensor * 0.02).bfloat16().float() - 0.5 for name, tensor in vector.items()} for vector in vectors
    ]


@each_order_free_case
@pytest.mark.parametrize("seed", range(3))
def test_order_of_tasks_does_not_matter_where_magnitudes_are_equal(label, seed):
    vectors = on_a_grid(normal_streams(num_tasks=6, seed=seed))
    magnitudes = torch.stack([vector["matrix"] for vector in vectors]).abs().sort(dim=0).values
    assert (magnitudes.diff(dim=0) == 0).any()
    merged = fold(CASES[label].build(), vectors).compute()
    for order in ([5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]):
        shuffled = fold(CASES[label].build(), [vectors[task] for task in order], tasks=order).compute()
        assert_close(shuffled, {name: tensor.numpy() for name, tensor in merged.items()}, close(label))


@each_order_free_case
@quick
@given(vectors=streams(max_tasks=6), data=st.data())
def test_joining_parts_in_any_tree_equals_one_stream(label, vectors, data):
    vectors = suited(label, vectors)
    parts = [fold(CASES[label].build(), [vector], tasks=[task]) for task, vector in enumerate(vectors)]
    parts.append(CASES[label].build())  # one that has seen nothing
    while len(parts) > 1:
        left = data.draw(st.integers(0, len(parts) - 2))
        parts[left].merge_state(parts.pop(left + 1))
    assert parts[0].num_tasks == len(vectors)
    assert_close(parts[0].compute(), expected(label, vectors), close(label))
    assert sorted(parts[0].tasks) == list(range(len(vectors)))
    fold(parts[0], [vectors[0]], tasks=[len(vectors)])  # and it goes on
    assert_close(parts[0].compute(), expected(label, [*vectors, vectors[0]]), close(label))


@each_case
def test_joining_changes_one_side_or_is_refused(label):
    left = fold(CASES[label].build(), normal_streams(2))
    right = fold(CASES[label].build(), normal_streams(1, seed=1), tasks=[2])
    before = right.state_dict()
    if left.order_free:
        left.merge_state(right)
        assert left.tasks == (0, 1, 2)
    else:
        with pytest.raises(RuntimeError, match="order of tasks"):
            left.merge_state(right)
    assert_same_bits(right.state_dict(), before)


@each_order_free_case
def test_joining_refuses_what_does_not_match(label):
    left = CASES[label].build()
    vectors = normal_streams(num_tasks=2)
    left.update(vectors[0], base="a" * 64, statistics=statistics_for(vectors[0], 0))
    before = left.state_dict()

    def other(vector, base=None):
        merger = CASES[label].build()
        merger.update(vector, task=1, base=base, statistics=statistics_for(vector, 1))
        return merger

    with pytest.raises(ValueError, match="base model"):
        left.merge_state(other(vectors[1], base="b" * 64))
    for case, message in (("renamed", "nearest"), ("shape", "shape"), ("precision", "float64")):
        with pytest.raises(ValueError, match=message):
            left.merge_state(other(spoiled(dict(vectors[1]), case)))
    with pytest.raises(TypeError, match="expected another"):
        left.merge_state(GreedySoup())
    with pytest.raises(ValueError, match="both hold task 0"):
        left.merge_state(left)
    assert_same_bits(left.state_dict(), before)


@pytest.mark.parametrize("label", [label for label, case in CASES.items() if case.build().removable])
def test_taking_a_task_out_restores_the_state(label):
    vectors = normal_streams(4)
    merger = fold(CASES[label].build(), vectors[:3])
    before = merger.compute()
    merger.update(vectors[3], task=3, statistics=statistics_for(vectors[3], 3))
    assert merger.num_tasks == 4
    merger.downdate(vectors[3], task=3, statistics=statistics_for(vectors[3], 3))
    assert merger.num_tasks == 3
    assert_close(merger.compute(), {name: tensor.numpy() for name, tensor in before.items()}, close(label, 1e-5))
    merger.downdate(vectors[1], task=1, statistics=statistics_for(vectors[1], 1))
    assert_close(merger.compute(), expected(label, [vectors[0], vectors[2]], [0, 2]), close(label, 1e-5))


@each_case
def test_rules_that_cannot_take_a_task_out_say_so(label):
    merger = CASES[label].build()
    if merger.removable:
        with pytest.raises(RuntimeError, match="expected a merged task"):
            merger.downdate(normal_streams(1)[0])
    else:
        with pytest.raises(TypeError, match="take tasks out"):
            fold(merger, normal_streams(1)).downdate(normal_streams(1)[0])


@each_case
def test_missing_statistics_are_named(label):
    merger = CASES[label].build()
    if names := sorted(merger.requires):
        with pytest.raises(ValueError, match=names[0]):
            merger.update(normal_streams(1)[0], score=score, gradients=gradients)
    else:
        merger.update(normal_streams(1)[0], score=score, gradients=gradients)


@each_case
def test_saving_and_loading_in_the_middle_changes_nothing(label):
    vectors = normal_streams(num_tasks=5)
    straight = fold(CASES[label].build(), vectors)

    first = fold(CASES[label].build(), vectors[:2])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = CASES[label].build()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same_bits(resumed.state_dict(), first.state_dict())
    fold(resumed, vectors[2:])
    assert_same_bits(resumed.state_dict(), straight.state_dict())
    assert_same_bits(resumed.compute(), straight.compute())


@each_case
def test_state_is_neither_aliased_nor_written_by_others(label):
    vectors = normal_streams()
    originals = copy.deepcopy(vectors)
    merger = fold(CASES[label].build(), vectors)
    for vector, original in zip(vectors, originals, strict=True):
        assert_same_bits(vector, original)
    result = merger.compute()
    for vector in [*vectors, merger.compute(), merger.state_dict()]:
        for tensor in tensors_in(vector):
            tensor.fill_(99)
    assert_same_bits(merger.compute(), result)


def spoiled(vector, case):
    if case == "nan":
        vector["bias"][3] = float("nan")
    if case == "inf":
        vector["scalar"].fill_(-float("inf"))
    if case == "missing":
        del vector["bias"]
    if case == "renamed":
        vector["biass"] = vector.pop("bias")
    if case == "shape":
        vector["matrix"] = vector["matrix"].t()
    if case == "integer":
        vector["bias"] = vector["bias"].long()
    if case == "precision":
        vector["bias"] = vector["bias"].double()
    return vector


@each_case
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nan", "1 NaN or Inf .* 'bias'"),
        ("inf", "NaN or Inf .* 'scalar'"),
        ("missing", "1 missing: 'bias'"),
        ("renamed", "nearest: 'bias'"),
        ("shape", r"shape \(4, 5\) for 'matrix'"),
        ("integer", "int64 for 'bias'"),
        ("precision", "float64"),
        ("base", "base model"),
    ],
)
def test_what_is_refused_leaves_the_state_as_it_was(label, case, message):
    merger = CASES[label].build()
    vectors = normal_streams(num_tasks=3)
    statistics = statistics_for(vectors[0], 0)
    merger.update(vectors[0], base="a" * 64, score=score, gradients=gradients, statistics=statistics)
    before = merger.state_dict()
    with pytest.raises(ValueError, match=message):
        merger.update(
            spoiled(vectors[1], case),
            base="b" * 64 if case == "base" else None,
            score=score,
            gradients=gradients,
            statistics=statistics,
        )
    assert_same_bits(merger.state_dict(), before)
    assert merger.base == "a" * 64


@each_case
@pytest.mark.parametrize("num_tasks", [1, 3])
def test_state_size_is_what_the_tensors_take(label, num_tasks):
    vectors = normal_streams(num_tasks)
    merger = fold(CASES[label].build(), vectors)
    taken = sum(tensor.nbytes for tensor in tensors_in(merger.state_dict()))
    assert merger.state_size(SHAPES, num_tasks) == taken


@each_case
def test_task_index_not_arrival_seeds_random_numbers(label):
    vectors = normal_streams(num_tasks=3)
    tasks = [5, 3, 9]
    assert_close(fold(CASES[label].build(), vectors, tasks).compute(), expected(label, vectors, tasks), close(label))


@each_case
def test_reset_forgets_everything_but_settings(label):
    merger = fold(CASES[label].build(), normal_streams(seed=1))
    merger.reset()
    with pytest.raises(RuntimeError, match="at least one update"):
        merger.compute()
    vectors = normal_streams(seed=2)
    assert_same_bits(fold(merger, vectors).state_dict(), fold(CASES[label].build(), vectors).state_dict())


@each_case
def test_inference_mode_leaves_ordinary_tensors(label):
    merger = CASES[label].build()
    vectors = normal_streams()
    with torch.inference_mode():
        fold(merger, vectors[:2])
        inside = merger.compute()
    assert not any(tensor.is_inference() for tensor in inside.values())
    assert_close(fold(merger, vectors[2:], tasks=[2, 3]).compute(), expected(label, vectors), close(label))


@pytest.mark.parametrize("rule", own_rules().values(), ids=lambda rule: rule.__name__)
def test_settings_rebuild_every_rule(rule):
    merger = rule()
    assert rule(**merger.settings()).settings() == merger.settings()
    assert list(merger.settings()) == list(inspect.signature(rule).parameters)


@each_case
def test_gradients_are_left_alone(label):
    vector = {name: tensor.requires_grad_() for name, tensor in normal_streams(1)[0].items()}
    merged = fold(CASES[label].build(), [vector]).compute()
    assert not any(tensor.requires_grad for tensor in merged.values())


@pytest.mark.parametrize("rule", own_rules().values(), ids=lambda rule: rule.__name__)
def test_every_rule_describes_itself(rule):
    merger = rule()
    assert merger.name == merger.label
    assert rule.summary
    assert rule.__doc__
    assert set(rule.requires) <= set(statistics_of(0, {}))
    assert rule.__name__ in repr(merger)
    if rule.__name__ not in ("Pipeline", "DOP"):  # no paper of its own; no arXiv id
        assert rule.source.count(".") == 1
