import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_up import make_results

from clmerge.cli import main
from clmerge.runs.comparison.compare import Comparison, Request, check_request
from clmerge.runs.comparison.document import build_document, group_names, own_figures
from clmerge.runs.comparison.table import comparison_lines
from clmerge.merging import MagMax
from clmerge.results.results import Results, validate

# R of the merger falls on task 1 from 1.0 to 0.5 and back: forgetting is no linear function of R.
MERGED = ([[0.8, 0.1, 0.2], [0.5, 0.6, 0.2], [0.7, 0.4, 0.9]], [[0.6, 0.1, 0.2], [0.9, 0.6, 0.2], [0.5, 0.8, 0.9]])
EXPERT = [[0.8, 0.1, 0.2], [0.1, 1.0, 0.2], [0.1, 0.2, 0.5]]


def comparison(tmp_path, name, *, seed, matrix, start="previous", tasks=("a", "b", "c")):
    run = SimpleNamespace(
        name=name,
        config={"seed": seed, "learner": {"start_policy": start}},
        folder=SimpleNamespace(path=Path(f"runs/{name}")),
        tasks=[SimpleNamespace(name=task) for task in tasks],
        num_parameters=10,
        bank=SimpleNamespace(tasks=[]),
    )
    results = Results(tasks, classes=[[task] for task in tasks], samples=[10, 10, 20])
    for model, rows in (("ties", matrix), ("expert", EXPERT)):
        for row in rows:
            results.add_row(model, row, row)
    results.set_zero_shot([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    settings = {"ties": {"merger": "TIES", "search": 0}}
    search = {"model": "ties", "run": name, "chosen": {"scale": 1}, "points": [{}], "score": 0.5, "rule": None}
    search["parameters"] = {"scale": [1, 2]}
    kept = {model: [40, 40, 40] for model in ("ties", "expert", "zero_shot")}
    return Comparison(run, results, settings, kept, {"ties": [0.1, 0.1, 0.1]}, [search])


def test_figures_of_every_task_are_what_they_say(tmp_path):
    results = comparison(tmp_path, "x", seed=0, matrix=MERGED[0]).results
    found = own_figures(results, "ties", "task_agnostic")
    assert found["worst_task"] == [0.8, 0.5, 0.4]
    assert found["gap_to_experts"] == pytest.approx([0.0, (0.3 + 0.4) / 2, (0.1 + 0.6 - 0.4) / 3])
    assert found["normalised_accuracy"] == pytest.approx(
        [1.0, (0.5 / 0.8 + 0.6) / 2, (0.7 / 0.8 + 0.4 + 0.9 / 0.5) / 3]
    )


def test_seeds_are_aggregated_figure_by_figure(tmp_path):
    found = [comparison(tmp_path, f"s{seed}", seed=seed, matrix=MERGED[seed]) for seed in (0, 1)]
    document = json.loads(json.dumps(build_document(found)))
    validate(document)
    assert list(document["models"]) == [f"{m}@s{s}" for m in ("ties",) for s in (0, 1)] + [
        f"{m}@s{s}" for s in (0, 1) for m in ("expert", "zero_shot")
    ]
    entry = document["compare"]["aggregates"][0]
    figures = [one.results.figures("ties") for one in found]
    assert figures[0]["forgetting"] == pytest.approx((0.1 + 0.2) / 2)
    assert entry["task_agnostic"]["forgetting"]["mean"] == pytest.approx(sum(f["forgetting"] for f in figures) / 2)
    assert entry["task_agnostic"]["average_accuracy"]["std"][-1] == pytest.approx(abs(2.0 - 2.2) / 3 / 2**0.5)
    assert document["models"]["ties@s1"] == found[1].results.to_dict()["models"]["ties"]
    assert [search["model"] for search in document["compare"]["searches"]] == ["ties@s0", "ties@s1"]
    assert document["compare"]["settings"]["ties@s1"]["search"] == 1
    lines, _ = comparison_lines(document, "task_agnostic")
    row = next(line for line in lines if line.startswith("ties"))
    assert "(2 runs)" in row
    assert "70.0 +-4.7" in row
    assert any("scale=1 (at the edge of what was tried)" in line for line in lines)


def test_runs_with_other_orders_of_classes_share_places_not_names(tmp_path):
    one = comparison(tmp_path, "s0", seed=0, matrix=MERGED[0])
    other = comparison(tmp_path, "s1", seed=1, matrix=MERGED[1], tasks=("c", "a", "b"))
    document = build_document([one, other])
    assert document["tasks"] == ["task 1", "task 2", "task 3"]
    assert [run["tasks"] for run in document["compare"]["runs"]] == [["a", "b", "c"], ["c", "a", "b"]]


def test_runs_of_other_lengths_are_refused(tmp_path):
    short = comparison(tmp_path, "short", seed=1, matrix=MERGED[1])
    short.results = Results(["a"], classes=[["a"]])
    with pytest.raises(ValueError, match="as many tasks to compare, got s0: 3, short: 1"):
        build_document([comparison(tmp_path, "s0", seed=0, matrix=MERGED[0]), short])


def test_groups_are_named_after_what_differs():
    configs = [
        {"seed": 0, "name": "a", "stream": {"init_args": {"seed": 0}}, "learner": {"start_policy": "base"}, "x": 1},
        {"seed": 1, "name": "b", "stream": {"init_args": {"seed": 1}}, "learner": {"start_policy": "base"}, "x": 1},
        {"seed": 1, "name": "c", "stream": {"init_args": {"seed": 1}}, "learner": {"start_policy": "merged"}, "x": 1},
    ]
    assert group_names(configs) == ["learner.start_policy=base"] * 2 + ["learner.start_policy=merged"]
    assert group_names(configs[:2]) == ["", ""]


def test_runs_that_do_not_fit_are_refused_before_any_is_evaluated(monkeypatch, capsys, tmp_path):
    found = {
        "a": make_results(3),
        "b": make_results(2),
        "c": make_results(3),
    }
    found["c"].evaluation = "task_aware"
    runs = {name: SimpleNamespace(results=results) for name, results in found.items()}
    monkeypatch.setattr("clmerge.cli.compare.open_run", lambda path, **options: (runs[path], [MagMax()]))
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
