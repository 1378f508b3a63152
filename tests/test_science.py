"""The tables of the docs are what scripts/science makes of the committed figures, and its statistics are right."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr, ttest_1samp, ttest_ind

ROOT = Path(__file__).parents[1]
SCIENCE = ROOT / "scripts" / "science"
PAGES = ["methods.md", "why.md", "claims.md", "predictors.md", "which_merger.md"]


@pytest.fixture
def science(monkeypatch):
    """The folder's modules, which import each other by bare names, for one test."""
    monkeypatch.syspath_prepend(str(SCIENCE))
    monkeypatch.syspath_prepend(str(SCIENCE.parent))
    known = set(sys.modules)

    def load(name):
        __import__(name)
        return sys.modules[name]

    yield load
    for name in set(sys.modules) - known:
        if (SCIENCE / f"{name}.py").is_file():
            del sys.modules[name]


def test_every_table_is_made_from_the_committed_figures():
    done = subprocess.run([sys.executable, SCIENCE / "pages.py", "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for block in re.findall(r"<!-- science: [\w-]+ -->\n(.*?)<!-- science: end -->", text, re.DOTALL):
            assert len(block.strip().splitlines()) > 1, page


def test_a_changed_figure_is_noticed(tmp_path, science, monkeypatch):
    pages, collect = science("pages"), science("collect")
    known = json.loads(collect.FILE.read_text())
    row = next(run for run in known["runs"] if "ties" in run["models"])
    row["models"]["ties"]["aware"]["accuracy"] += 0.1
    changed = tmp_path / "methods.json"
    changed.write_text(json.dumps(known))
    monkeypatch.setattr(science("rows"), "FILE", changed)
    assert pages.main(["--check"]) == 1


def test_intervals_are_those_of_the_t_distribution(science):
    intervals = science("intervals")
    values = [0.1, 0.25, 0.15, 0.3]
    one = intervals.interval_of(values)
    expected = ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (one.low, one.high) == pytest.approx((expected.low, expected.high))
    assert one.sign == 1
    assert intervals.interval_of([-0.1, 0.25, 0.15, -0.3]).sign == 0
    assert intervals.interval_of([0.1]).sign == 0


def test_rank_correlations_leave_out_what_groups_differ_by(science):
    correlation = science("intervals").rank_correlation
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=40), generator.normal(size=40)
    clusters = [str(place) for place in range(40)]
    one = correlation(x, y, ["a"] * 40, clusters)
    assert one.mean == pytest.approx(spearmanr(x, y).statistic)
    assert one.low < one.mean < one.high
    groups = ["a"] * 20 + ["b"] * 20
    shift = np.repeat([0.0, 100.0], 20)  # between the groups everything correlates
    shifted = correlation(x + shift, y + shift, groups, clusters)
    inside = [spearmanr(x[part], y[part]).statistic for part in (slice(20), slice(20, 40))]
    assert shifted.mean == pytest.approx(np.mean(inside))
    assert correlation(x, x + shift, groups, clusters).mean == pytest.approx(1.0)


def test_means_of_groups_have_the_interval_of_welch(science):
    """Two groups, the second one negated, are Welch's test of their difference, with half the mean."""
    first, second = [0.1, 0.25, 0.15, 0.3], [0.4, 0.35, 0.6]
    one = science("intervals").mean_of_groups([first, [-value for value in second]])
    expected = ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert (2 * one.low, 2 * one.high) == pytest.approx((expected.low, expected.high))
    assert science("intervals").mean_of_groups([first, [1.0]]).sign == 0


def test_a_verdict_needs_an_interval_that_excludes_zero(science):
    found = science("claims").Found
    above, below, both = [1, 1.1, 0.9], [-1, -1.1, -0.9], [-1, 0, 1.1]
    assert found({"a": above, "b": above}).verdict == "holds"
    assert found({"a": above, "b": both}).verdict == "holds on a alone"
    assert found({"a": below, "b": both}).verdict == "fails on a alone"
    assert found({"a": below, "b": below}).verdict == "fails"
    assert found({"a": below, "b": above}).verdict == "depends on the stream"
    assert found({"a": both}).verdict == "not decided here"
    assert found({"a": above, "b": [-5]}).verdict == "holds"  # one seed has no interval, and is not in the mean
    together = {name: [0.1, 0.2, 0.9] for name in "abc"}  # none alone, all of them together
    assert [one.sign for one in found(together).streams.values()] == [0, 0, 0]
    assert found(together).verdict == "holds"


def test_every_claim_compares_rows_that_exist(science):
    claims, rows = science("claims"), science("rows")
    table = rows.table_of(rows.load())
    for claim in claims.CLAIMS:
        assert claims.compared(claim, table).by_stream, claim.text


def test_every_strength_that_is_taken_was_tried_and_was_best(science):
    plan, known = science("plan"), science("rows").load()["strengths"]
    assert {(one["way"], one["stream"]) for one in known} == {(w, s) for w, on in plan.TRIED.items() for s in on}
    for one in known:
        scores = dict(one["scores"])
        assert set(scores) == set(plan.TRIED[one["way"]][one["stream"]])
        assert scores[plan.STRENGTHS[one["way"]][one["stream"]]] == max(scores.values()), one
