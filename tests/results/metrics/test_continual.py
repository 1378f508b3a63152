import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clmerge.results.metrics import continual

# A four-task matrix whose figures tell every framework's convention from the papers' one.
R = [[0.80, 0.20, 0.15, 0.10], [0.85, 0.70, 0.30, 0.12], [0.90, 0.75, 0.60, 0.25], [0.82, 0.72, 0.65, 0.90]]
BASELINE = [0.10, 0.12, 0.08, 0.11]
NAN = float("nan")


def exactly(value):
    return pytest.approx(value, abs=1e-15, nan_ok=True)


def test_papers_values():
    assert continual.average_accuracy(R) == exactly([0.8, 0.775, 0.75, 0.7725])
    assert continual.average_incremental_accuracy(R) == exactly(0.774375)
    assert continual.forgetting(R) == exactly(0.02)
    assert continual.forgetting_per_task(R) == exactly([0.08, 0.03, -0.05, NAN])
    assert continual.backward_transfer(R) == exactly(0.03)
    assert continual.forward_transfer(R, BASELINE) == exactly(0.44 / 3)
    assert continual.learning_accuracy(R) == exactly(0.75)
    assert continual.last(R) == exactly(0.7725)
    assert continual.transfer(R) == exactly((0.20 + (0.15 + 0.30) / 2 + (0.10 + 0.12 + 0.25) / 3) / 3)
    assert continual.average(R) == exactly(sum(map(sum, R)) / 16)


@pytest.mark.parametrize(
    ("framework", "value"),
    [
        ("Mammoth, PyCIL and PILOT clip: the maximum includes the last row", 0.11 / 3),
        ("Avalanche has no maximum: R[k, k] - R[T, k]", -0.03),
        ("RaptorMai divides by T instead of T - 1", 0.0275),
    ],
)
def test_forgetting_is_none_of_the_other_conventions(framework, value):
    matrix = np.array(R)
    others = {
        "Mammoth": (matrix[:, :3].max(axis=0) - matrix[3, :3]).mean(),
        "Avalanche": (matrix.diagonal() - matrix[3])[:3].mean(),
        "RaptorMai": (matrix.max(axis=0) - matrix[3]).mean(),
    }
    assert others[framework.split()[0].strip(",")] == exactly(value)
    assert abs(continual.forgetting(R) - value) > 0.005


def test_transfers_are_none_of_continuums_conventions():
    matrix = np.array(R)
    all_pairs = np.mean([matrix[i, j] - matrix[j, j] for i in range(4) for j in range(i)])
    assert all_pairs == exactly(0.29 / 6)
    assert continual.backward_transfer(R) != pytest.approx(all_pairs, abs=0.01)
    without_baseline = np.mean([matrix[j - 1, j] for j in range(1, 4)])
    assert without_baseline == exactly(0.25)
    assert continual.forward_transfer(R, [0] * 4) == exactly(without_baseline)
    assert continual.forward_transfer(R, BASELINE) != pytest.approx(without_baseline, abs=0.01)


def test_zero_shot_accuracy_before_learning_is_not_forgotten():
    # Task 1 scored 0.9 zero-shot, 0.5 once learned: nothing was forgotten after learning it.
    matrix = [[0.8, 0.9, 0.1], [0.8, 0.5, 0.1], [0.8, 0.5, 0.7]]
    assert continual.forgetting_per_task(matrix) == exactly([0, 0, NAN])


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.tuples(
            st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=1, max_size=n),
            st.lists(st.floats(0, 1), min_size=n, max_size=n),
            st.lists(st.integers(1, 50), min_size=n, max_size=n),
        )
    )
)
def test_equal_the_formulas_written_as_loops(data):
    matrix, baseline, samples = data
    n = len(matrix)

    def mean(values):
        values = list(values)
        return sum(values) / len(values) if values else NAN

    close = {"abs": 1e-12, "nan_ok": True}
    averages = [mean(matrix[t][j] for j in range(t + 1)) for t in range(n)]
    weighted = [sum(samples[j] * matrix[t][j] for j in range(t + 1)) / sum(samples[: t + 1]) for t in range(n)]
    drops = [max(matrix[k][j] for k in range(j, n - 1)) - matrix[n - 1][j] for j in range(n - 1)]
    assert continual.average_accuracy(matrix) == pytest.approx(averages, **close)
    assert continual.average_accuracy(matrix, samples=samples) == pytest.approx(weighted, **close)
    assert continual.average_incremental_accuracy(matrix, samples=samples) == pytest.approx(mean(weighted), **close)
    assert continual.forgetting(matrix) == pytest.approx(mean(drops), **close)
    gains = [matrix[n - 1][j] - matrix[j][j] for j in range(n - 1)]
    assert continual.backward_transfer(matrix) == pytest.approx(mean(gains), **close)
    forward = [matrix[j - 1][j] - baseline[j] for j in range(1, n)]
    assert continual.forward_transfer(matrix, baseline) == pytest.approx(mean(forward), **close)
    zero_shot = [mean(matrix[i][j] for i in range(j)) for j in range(1, n)]
    assert continual.transfer(matrix) == pytest.approx(mean(zero_shot), **close)
    assert continual.average(matrix) == pytest.approx(mean(matrix[i][j] for i in range(n) for j in range(n)), **close)
    # Chaudhry's maximum is at least the accuracy right after learning, which is what GEM starts from.
    if n > 1:
        assert continual.forgetting(matrix) >= -continual.backward_transfer(matrix) - 1e-12
        assert -1 <= continual.forgetting(matrix) <= 1


def test_a_run_in_progress_is_the_stream_cut_short():
    cut = [row[:2] for row in R[:2]]
    for name in (
        "average_accuracy",
        "average_incremental_accuracy",
        "forgetting",
        "backward_transfer",
        "learning_accuracy",
        "transfer",
        "average",
        "last",
    ):
        figure = getattr(continual, name)
        assert figure(R[:2]) == figure(cut), name
    assert continual.forward_transfer(R[:2], BASELINE) == continual.forward_transfer(cut, BASELINE[:2])
    assert continual.forgetting_per_task(R[:2]) == exactly([-0.05, NAN, NAN, NAN])


def test_one_task_has_no_forgetting_and_no_transfer():
    row = [[0.9, 0.1]]
    assert continual.average_accuracy(row) == [0.9]
    for value in (
        continual.forgetting(row),
        continual.backward_transfer(row),
        continual.forward_transfer(row, [0.5, 0.5]),
        continual.transfer(row),
    ):
        assert math.isnan(value)


def test_nothing_finished_is_undefined_everywhere():
    for empty in ([], np.empty((0, 3))):
        assert continual.average_accuracy(empty) == []
        assert math.isnan(continual.average_incremental_accuracy(empty))
        assert math.isnan(continual.forgetting(empty))
        assert math.isnan(continual.backward_transfer(empty))
        assert math.isnan(continual.forward_transfer(empty, [0.1]))
        assert math.isnan(continual.last(empty))
        assert math.isnan(continual.normalised_accuracy(empty, [0.1]))


def test_an_undefined_upper_triangle_leaves_the_rest_alone():
    lower = [[value if j <= i else None for j, value in enumerate(row)] for i, row in enumerate(R)]
    for name in ("average_accuracy", "forgetting", "backward_transfer", "learning_accuracy", "last"):
        assert getattr(continual, name)(lower) == exactly(getattr(continual, name)(R)), name
    assert math.isnan(continual.forward_transfer(lower, BASELINE))
    assert math.isnan(continual.transfer(lower))
    assert math.isnan(continual.average(lower))


def test_an_undefined_entry_is_never_skipped():
    matrix = [[0.5, 0.1], [None, 0.9]]
    assert continual.average_accuracy(matrix) == exactly([0.5, NAN])
    assert math.isnan(continual.forgetting(matrix))


def test_normalised_accuracy_and_merge_gap():
    merged = [[0.6, 0.1], [0.4, 0.9]]
    assert continual.normalised_accuracy(merged, [0.8, 0.9]) == exactly((0.5 + 1.0) / 2)
    assert math.isnan(continual.normalised_accuracy(merged, [0.0, 0.9]))
    assert continual.merge_gap([[0.8, 0.0], [0.1, 0.9]], merged) == exactly([0.2, 0.0])
    with pytest.raises(ValueError, match=r"expert's shape \(1, 2\), got \(2, 2\)"):
        continual.merge_gap([[0.8, 0.0]], merged)


def test_tasks_without_samples_do_not_divide_by_zero():
    assert continual.average_accuracy([[0.5, 0.1]], samples=[0, 3]) == exactly([NAN])


@pytest.mark.parametrize(
    "kind",
    [np.array, lambda rows: torch.tensor(rows, dtype=torch.float64), lambda rows: tuple(map(tuple, rows))],
)
def test_arrays_tensors_and_sequences_are_the_same(kind):
    assert continual.forgetting(kind(R)) == exactly(continual.forgetting(R))


@pytest.mark.parametrize("matrix", [[0.5, 0.6], [[0.5], [0.6]], np.zeros((1, 2, 2))])
def test_shapes_are_checked(matrix):
    with pytest.raises(ValueError, match="expected an accuracy matrix"):
        continual.average_accuracy(matrix)


def test_vectors_are_checked():
    with pytest.raises(ValueError, match=r"expected baseline .* at least 4, got shape \(2,\)"):
        continual.forward_transfer(R, [0.1, 0.2])
