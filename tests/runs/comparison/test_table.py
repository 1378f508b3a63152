"""The table of ``clmerge compare``, over one run and over several."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from made_up import make_results

from clmerge.cli import main
from clmerge.deploy.describe import describe_merger
from clmerge.merging import TIES, MagMax
from clmerge.report.runs import Run
from clmerge.report.study import make_study
from clmerge.results.results import Results
from clmerge.runs.comparison.compare import Request, check_request
from clmerge.runs.comparison.table import comparison_lines

# R of the merger falls on task 1 from 1.0 to 0.5 and back: forgetting is no linear function of R.
MERGED = ([[0.8, 0.1, 0.2], [0.5, 0.6, 0.2], [0.7, 0.4, 0.9]], [[0.6, 0.1, 0.2], [0.9, 0.6, 0.2], [0.5, 0.8, 0.9]])
EXPERT = [[0.8, 0.1, 0.2], [0.1, 1.0, 0.2], [0.1, 0.2, 0.5]]


def compared(name, *, seed, tasks=("a", "b", "c"), start="previous"):
    results = Results(tasks, classes=[[task] for task in tasks], samples=[10, 10, 20], name=name, seed=seed)
    for model, rows in (("ties", MERGED[seed]), ("expert", EXPERT)):
        for row in rows:
            seconds = 0.1 if model == "ties" else None
            results.add_row(model, row, row, bytes_kept=4_000_000, merge_seconds=seconds)
    results.set_zero_shot([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    results.describe("ties", **describe_merger(TIES(), search=0))
    search = {"model": "ties", "method": "grid", "parameters": {"scale": [1, 2]}, "chosen": {"scale": 1}}
    results.searches = [{**search, "points": [{}], "score": 0.5, "rule": None}]
    return Run(Path(name), results, config={"seed": seed, "learner": {"start_policy": start}})


def lines(*runs):
    return comparison_lines(make_study(runs), "task_agnostic")[0]


def row(found, model):
    return next(line for line in found if line.startswith(model)).split()


def test_a_row_has_the_figures_of_its_run():
    found = lines(compared("s0", seed=0))
    assert row(found, "ties") == [
        "ties",
        "*",
        "80.0",
        "55.0",
        "66.7",
        "15.0",
        "40.0",
        "10.0",
        "102.5",
        "4.0",
        "0.30",
        "val",
    ]
    assert row(found, "expert")[-3:] == ["4.0", "-", "-"]
    assert "ties: scale=1 (at the edge of what was tried) chosen of 1 by 50.0 % on validation images" in found


def test_seeds_are_averaged_where_they_are_shown():
    runs = [compared(f"s{seed}", seed=seed) for seed in (0, 1)]
    found = lines(*runs)
    assert " ".join(row(found, "ties")).startswith("ties (2 runs) * 70.0 65.0 70.0 +-4.7")
    forgetting = [run.results.figures("ties")["forgetting"] for run in runs]
    assert forgetting[0] == pytest.approx((0.1 + 0.2) / 2)
    assert f"{100 * sum(forgetting) / 2:.1f}" in row(found, "ties")
    assert sum("chosen of 1" in line for line in found) == 2
    assert any(line.startswith("ties of s1: ") for line in found)


def test_groups_are_rows_of_their_own():
    found = lines(compared("s0", seed=0), compared("s1", seed=1, start="base"))
    assert {line.split(")")[0] for line in found if line.startswith("ties (")} == {
        "ties (start_policy=previous",
        "ties (start_policy=base",
    }


def test_runs_with_other_orders_of_classes_share_places_not_names():
    study = make_study([compared("s0", seed=0), compared("s1", seed=1, tasks=("c", "a", "b"))])
    assert study.tasks == ("task 1", "task 2", "task 3")


def test_runs_that_do_not_fit_are_refused_before_any_is_evaluated(monkeypatch, capsys, tmp_path):
    found = {"a": make_results(3), "b": make_results(2), "c": make_results(3)}
    found["c"].evaluation = "task_aware"
    runs = {name: SimpleNamespace(results=results, leave_out=lambda without: None) for name, results in found.items()}
    monkeypatch.setattr("clmerge.cli.open_run.open_run", lambda path, **options: (runs[path], [MagMax()]))
    monkeypatch.setattr("clmerge.runs.comparison.compare.check_request", lambda run, request, joint: {})
    monkeypatch.setattr("clmerge.runs.comparison.compare.compare_run", lambda *a: pytest.fail("evaluated"))
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "a", "b", "--out", "out"]) == 1
    assert "expected runs of as many tasks to compare, got a: 3, b: 2" in capsys.readouterr().err
    assert main(["compare", "a", "c", "--out", "out"]) == 1
    message = capsys.readouterr().err
    assert "go by the same accuracy, got a: task_agnostic, c: task_aware; choose one with --evaluation" in message
    assert not (tmp_path / "out").exists()


def test_a_joint_run_of_other_classes_is_refused_before_anything_is_evaluated():
    run, joint = (
        SimpleNamespace(
            stream=SimpleNamespace(class_names=names),
            config={"model": {"backbone": "x"}},
            folder=SimpleNamespace(path=names[0]),
            base={},
            tasks=[],
        )
        for names in (["a"], ["b"])
    )
    with pytest.raises(ValueError, match="expected the classes of a in the joint run b, got others"):
        check_request(run, Request({}), joint)
