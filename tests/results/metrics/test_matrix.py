import math

import numpy as np
import pytest

from clmerge.results.metrics import AccuracyMatrix
from clmerge.results.metrics.matrix import Figures


def grown(*rows):
    matrix = AccuracyMatrix(len(rows[0]))
    for row in rows:
        matrix.add_row(row)
    return matrix


def test_grows_by_rows_and_hands_out_copies():
    matrix = grown([0.5, None])
    assert len(matrix) == 1
    matrix.values[0, 0] = 7
    assert matrix.values[0, 0] == 0.5
    assert math.isnan(matrix.values[0, 1])
    assert AccuracyMatrix(3).values.shape == (0, 3)


def test_summary_has_every_figure_even_before_the_first_task():
    for matrix in (AccuracyMatrix(2), grown([0.5, 0.1]), grown([0.5, 0.1], [0.4, 0.9])):
        assert matrix.summary().keys() == Figures.__required_keys__


def test_references_enter_the_summary():
    expert = grown([0.8, 0.1], [0.1, 0.9])
    merged = grown([0.6, 0.2], [0.4, 0.9])
    alone = merged.summary()
    assert math.isnan(alone["forward_transfer"])
    assert math.isnan(alone["normalised_accuracy"])
    assert math.isnan(alone["average_incremental_accuracy_by_samples"])
    assert np.isnan(alone["merge_gap"]).all()
    full = merged.summary(baseline=[0.3, 0.1], expert=expert, samples=[1, 3])
    assert full["forward_transfer"] == pytest.approx(0.1)
    assert full["normalised_accuracy"] == pytest.approx(0.75)
    assert full["merge_gap"] == pytest.approx([0.2, 0.0])
    assert full["average_incremental_accuracy_by_samples"] == pytest.approx((0.6 + (0.4 + 3 * 0.9) / 4) / 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0.5], r"shape \(2,\), got shape \(1,\)"),
        ([0.5, 87.0], r"in \[0, 1\], got 87"),
        ([-0.1, 0.5], "got -0.1"),
    ],
)
def test_rows_are_checked(row, message):
    with pytest.raises(ValueError, match=message):
        AccuracyMatrix(2).add_row(row)


def test_no_more_rows_than_tasks():
    matrix = grown([0.5])
    with pytest.raises(ValueError, match="at most 1 rows"):
        matrix.add_row([0.5])
    with pytest.raises(ValueError, match="at least one task"):
        AccuracyMatrix(0)
