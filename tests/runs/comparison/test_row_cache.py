import math

import pytest

from clmerge.results.confusion import Confusion
from clmerge.runs.comparison.row_cache import RowCache, make_row


def test_rows_come_back_with_the_same_bits(tmp_path):
    ledger = RowCache(tmp_path / "rows.json")
    row = make_row({"task_agnostic": [1 / 3, math.nan], "task_aware": [0.1 + 0.2, 1.0]}, 0.25)
    ledger.add({"a": row})
    ledger.add({"b": row})
    again = RowCache(tmp_path / "rows.json")
    for key in ("a", "b"):
        assert again[key]["task_agnostic"][0] == 1 / 3
        assert math.isnan(again[key]["task_agnostic"][1])
        assert again[key]["task_aware"] == row["task_aware"]
    assert "c" not in again
    answers = {"task_aware": Confusion([2, 1], [1, 1], [(0, None, 1)])}
    ledger.add({"c": make_row({**row, "confusion": answers})})
    assert RowCache(tmp_path / "rows.json")["c"]["confusion"] == answers
    assert "confusion" not in RowCache(tmp_path / "rows.json")["a"]


def test_keys_differ_in_everything_that_matters():
    key = RowCache.key("run", "MagMax(scale=0.5)", "test", [0, 1])
    assert key == RowCache.key("run", "MagMax(scale=0.5)", "test", [0, 1])
    others = [
        RowCache.key("run2", "MagMax(scale=0.5)", "test", [0, 1]),
        RowCache.key("run", "MagMax(scale=0.6)", "test", [0, 1]),
        RowCache.key("run", "MagMax(scale=0.5)", "val", [0, 1]),
        RowCache.key("run", "MagMax(scale=0.5)", "test", [1, 0]),
        RowCache.key("run", "MagMax(scale=0.5)", "test", [0]),
    ]
    assert len({key, *others}) == 6


def test_rows_of_another_version_are_computed_again(monkeypatch):
    key = RowCache.key("run", "MagMax(scale=0.5)", "test", [0])
    monkeypatch.setattr("clmerge.__version__", "9.9")
    assert RowCache.key("run", "MagMax(scale=0.5)", "test", [0]) != key


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 100_000,
        '{"a": {"task_agnostic": "0", "task_aware": [1], "merge_seconds": 1}}',
        "[]",
        '{"a": {"task_agnostic": [1]}}',
    ],
)
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=r"rows\.json"):
        RowCache(tmp_path / "rows.json")
