import json
import math

import numpy as np
import pytest
from made_up import make_results

from clmerge.results.contract import validate_run
from clmerge.results.metrics import continual
from clmerge.results.results import SETTINGS, Results, to_document, validate


def document(**changes):
    return json.loads(json.dumps(make_results().to_dict(), allow_nan=False)) | changes


def test_the_document_keeps_the_contract():
    found = document()
    assert found["tasks"] == ["task 1", "task 2", "task 3"]
    assert found["classes"][1] == ["class 2", "class 3"]
    assert set(found["models"]) == {"magmax", "ties_density0.1", "expert", "zero_shot"}
    for model in found["models"].values():
        assert (model["data"], model["rule"], model["probes"]) == ("none", None, {})
        assert model["kind"] in ("merged", "unmerged")
        for figures in (model[setting] for setting in SETTINGS):
            assert np.shape(figures["R"]) == (3, 3)
            assert len(figures["average_accuracy"]) == 3
            for name in (
                "average_incremental_accuracy",
                "average_incremental_accuracy_by_samples",
                "forgetting",
                "backward_transfer",
                "forward_transfer",
                "learning_accuracy",
                "transfer",
                "average",
                "last",
                "normalised_accuracy",
            ):
                assert isinstance(figures[name], float), name
            for name in ("merge_gap", "worst_task", "gap_to_experts"):
                assert len(figures[name]) == 3
            assert figures["forgetting_per_task"][-1] is None


def test_figures_are_those_of_the_matrix_in_full_precision():
    results = make_results()
    figures = document()["models"]["magmax"]["task_aware"]
    matrix = results.matrix("magmax", "task_aware")
    assert figures["R"] == matrix.tolist()
    assert figures["forgetting"] == continual.forgetting(matrix)
    baseline = results.matrix("zero_shot", "task_aware")[0]
    assert figures["forward_transfer"] == continual.forward_transfer(matrix, baseline)
    expert = results.matrix("expert", "task_aware")
    assert figures["normalised_accuracy"] == continual.normalised_accuracy(matrix, expert.diagonal())
    assert figures["merge_gap"] == continual.merge_gap(expert, matrix)


@pytest.mark.parametrize("finished", [0, 1, 2, 3])
@pytest.mark.parametrize("growing", [False, True])
def test_round_trip_is_exact_and_can_be_continued(finished, growing):
    results = make_results(finished=finished, growing=growing, models=("magmax", "expert"))
    results.add_seconds("train", 1 / 3)
    found = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    again = Results.from_dict(found)
    assert again.to_dict() == found == results.to_dict()
    if finished < 3:
        for each in (results, again):
            for model in ("magmax", "expert"):
                each.add_row(model, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
            each.add_seconds("train", 0.1)
        assert again.to_dict() == results.to_dict()


def test_undefined_is_null():
    one = make_results(finished=1, growing=True).to_dict()["models"]["magmax"]["task_agnostic"]
    assert one["R"][0][1:] == [None, None]
    assert one["forgetting"] is one["backward_transfer"] is one["forward_transfer"] is one["transfer"] is None
    assert one["forgetting_per_task"] == [None, None, None]
    bare = Results(["a", "b"], classes=[["0"], ["1"]])
    bare.add_row("ties", [1, 0], [1, 0])
    bare.add_row("ties", [1, 1], [1, 1])
    figures = bare.to_dict()["models"]["ties"]["task_agnostic"]
    assert figures["forward_transfer"] is figures["normalised_accuracy"] is None
    assert figures["average_incremental_accuracy_by_samples"] is None
    assert figures["merge_gap"] == [None, None]


def test_zero_shot_row_is_repeated_for_every_finished_task():
    results = make_results(finished=2)
    matrix = results.matrix("zero_shot")
    assert matrix.shape == (2, 3)
    assert (matrix[0] == matrix[1]).all()
    figures = results.figures("zero_shot")
    assert (figures["forgetting"], figures["forward_transfer"]) == (0, 0)


def test_models_are_mergers_then_references():
    results = make_results(models=("expert", "ties", "magmax"))
    assert results.models == ["ties", "magmax", "expert", "zero_shot"]
    assert results.mergers == ["ties", "magmax"]


def test_best_merger_is_by_average_accuracy_after_the_latest_task():
    results = Results(["a", "b"], classes=[["0"], ["1"]])
    assert results.best_merger() is None
    for model, row in {
        "expert": [1.0, 1.0],
        "early": [0.9, 0.1],
        "late": [0.2, 0.3],
        "equal": [0.9, 0.0],
    }.items():
        results.add_row(model, row, [0.5, 0.5])
    assert results.best_merger() == "early"
    for model, row in {
        "expert": [1.0, 1.0],
        "early": [0.2, 0.2],
        "late": [0.6, 0.6],
        "equal": [0, 1],
    }.items():
        results.add_row(model, row, [0.5, 0.5])
    assert results.best_merger() == "late"
    assert results.best_merger("task_aware") == "early"


def test_until_is_the_past():
    results = make_results()
    for finished in range(4):
        assert results.until(finished).to_dict() == make_results(finished=finished).to_dict()
    with pytest.raises(ValueError, match="at most 3 finished tasks, got 4"):
        results.until(4)


def test_seconds_add_up():
    results = make_results()
    results.add_seconds("train", 1.5)
    results.add_seconds("train", 2)
    assert results.to_dict()["seconds"] == {"train": 3.5}
    for value in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="'train'"):
            results.add_seconds("train", value)


def test_rows_missing_for_a_model_are_refused_when_writing():
    results = make_results(finished=1)
    results.add_row("magmax", [0.1] * 3, [0.1] * 3)
    with pytest.raises(RuntimeError, match=r"2 rows, got 1 for 'ties_density0\.1'"):
        results.to_dict()


def test_figures_that_need_the_expert_wait_for_its_row():
    results = make_results(finished=1)
    results.add_row("magmax", [0.1] * 3, [0.1] * 3)
    figures = results.figures("magmax")
    assert math.isnan(figures["normalised_accuracy"])
    assert np.isnan(figures["merge_gap"]).tolist() == [True, True]


def test_a_bad_row_adds_nothing():
    results = make_results(finished=1)
    with pytest.raises(ValueError, match="87"):
        results.add_row("magmax", [0.1] * 3, [87] * 3)
    assert len(results.matrix("magmax")) == 1
    with pytest.raises(ValueError, match="set_zero_shot"):
        results.add_row("zero_shot", [0.1] * 3, [0.1] * 3)
    with pytest.raises(ValueError, match="got 'tise'"):
        results.matrix("tise")


@pytest.mark.parametrize(
    ("tasks", "classes", "samples", "message"),
    [
        ([], [], None, "at least one task"),
        (["a", "a"], [["0"], ["1"]], None, r"\['a'\] more than once"),
        (["a", "b"], [["0"]], None, "2 tasks, got 1"),
        (["a"], [["0"]], [1, 2], "1 non-negative"),
        (["a"], [["0"]], [-1], "1 non-negative"),
    ],
)
def test_constructor_names_what_is_wrong(tasks, classes, samples, message):
    with pytest.raises(ValueError, match=message):
        Results(tasks, classes=classes, samples=samples)


def broken(path, value):
    found = document()
    place = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return found


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["name"], None, "name to be text, got None"),
        (["seed"], 0.5, "seed to be a whole number"),
        (
            ["models", "magmax"],
            {"kind": "merged", "data": "none", "task_agnostic": None},
            r"models\.magmax to have task_aware, missing",
        ),
        (["models", "magmax", "kind"], "molten", r"models\.magmax\.kind to be one of .*'molten'"),
        (["models", "magmax", "rule"], {"merger": 3, "init_args": None}, r"models\.magmax\.rule\.merger to be text"),
        (["models", "magmax", "bytes_kept"], [1, 2], r"magmax\.bytes_kept to have 3 items"),
        (["models", "magmax", "probes"], {"ece": {"per_task": [0.5]}}, r"probes\.ece\.per_task to be a list of 3"),
        (["models", "magmax", "task_aware"], None, r"magmax\.task_aware to be an object, got None"),
        (["models", "magmax", "task_agnostic", "R", 1], [0.5], r"models\.magmax\.task_agnostic\.R"),
        (
            ["models", "magmax", "task_agnostic", "forgetting"],
            math.nan,
            r"task_agnostic\.forgetting .* got nan",
        ),
        (["models", "magmax", "task_agnostic", "last"], "0.5", r"task_agnostic\.last .* got '0.5'"),
        (["models", "magmax", "task_aware", "R"], [], "3 items, one per finished task, got 0"),
        (["tasks"], 3, "tasks to be a list, got 3"),
        (["tasks"], [], "tasks to be a list of one or more"),
        (["tasks", 1], None, r"tasks\[1\] to be text, got None"),
        (["tasks", 1], "task 1", "tasks to be different names"),
        (["classes", 0], "cat", r"classes\[0\] to be a list, got 'cat'"),
        (["classes"], [[]], "classes to be a list of 3, got 1"),
        (["samples"], [1, True, 3], r"samples\[1\] to be a whole number"),
        (["models"], [], "models to be an object"),
        (["models", "magmax"], 3, r"models\.magmax to be an object, got 3"),
        (["models", "a b\n"], 3, r"models\['a b\\n'\] to be an object"),
        (
            ["models", "magmax", "task_aware", "R", 0, 2],
            1.5,
            r"magmax\.task_aware\.R\[0\]\[2\] .*from 0 to 1, got 1\.5",
        ),
        (["models", "magmax", "task_aware", "average_accuracy"], 0.5, r"average_accuracy to be a list, got 0\.5"),
        (["models", "magmax", "task_aware", "average_accuracy"], [0.5], r"average_accuracy to have 3 items"),
        (["models", "magmax", "task_aware", "last"], [0.5], r"task_aware\.last .* got \[0\.5\]"),
        (["models", "magmax", "task_aware", "last"], True, r"task_aware\.last .* got True"),
        (["models", "magmax", "task_aware", "last"], 10**400, r"task_aware\.last .* got 1000"),
        (["seconds"], None, "seconds to be an object"),
        (["seconds", "train"], -1.0, r"seconds\.train .* of 0 or more"),
        (["bytes"], {"bank": 0.5}, r"bytes\.bank"),
        (["baseline"], {"task_agnostic": [0.5] * 3}, "baseline to have task_aware"),
        (["seconds", "train"], math.inf, "seconds"),
    ],
)
def test_validate_names_the_place(path, value, message):
    validate_run(document())
    with pytest.raises(ValueError, match=message):
        Results.from_dict(broken(path, value))


def test_validate_names_missing_keys():
    found = document()
    del found["models"], found["seconds"]
    with pytest.raises(ValueError, match="the document to have models and seconds, missing"):
        validate_run(found)
    aware = document()
    del aware["models"]["expert"]["task_aware"]
    with pytest.raises(ValueError, match=r"models\.expert to have task_aware, missing"):
        validate_run(aware)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 3}, "schema 2, got 3; they were written by another version of clmerge$"),
        ({"schema": 1}, "schema 2, got 1; .*; python scripts/convert_results.py RUN converts"),
        ({"schema": True}, "schema 2, got True"),
        ({"runs": []}, "runs to be a list of one or more"),
        ({"runs": [document(), document()]}, r"runs to be different names, got \['', ''\]"),
        ({"runs": [document(tasks=3)]}, r"expected runs\[0\]\.tasks to be a list, got 3"),
    ],
)
def test_documents_are_refused_with_the_place(changes, message):
    found = to_document([Results.from_dict(document())])
    validate(found)
    with pytest.raises(ValueError, match=message):
        validate(found | changes)


def test_what_a_model_is_survives_the_file():
    results = make_results()
    rule = {"merger": "TIES", "init_args": {"density": 0.1}, "requires": [], "order_free": True, "exact_online": True}
    results.describe("magmax", kind="calibrated", rule=rule, data="buffer(10 per class)")
    results.model("magmax").probes["ece"] = {"per_task": [0.1, None, 0.3], "n": [10, 0, 10]}
    results.searches = [{"model": "magmax"}]
    again = Results.from_dict({**json.loads(json.dumps(results.to_dict())), "searches": []}).model("magmax")
    assert (again.kind, again.rule, again.data) == ("calibrated", rule, "buffer(10 per class)")
    assert again.probes == results.model("magmax").probes
    renamed = results.renamed({"magmax": "best"})
    assert "best" in renamed.models
    assert renamed.searches == [{"model": "best"}]
    assert results.mergers[0] == "magmax", "the original is unchanged"


def test_a_model_that_needs_the_task_has_no_task_agnostic_figures():
    results = Results(["a", "b"], classes=[["0"], ["1"]])
    results.add_row("emr", [math.nan, math.nan], [1.0, math.nan], bytes_kept=10, merge_seconds=0.5)
    found = json.loads(json.dumps(results.to_dict()))
    assert found["models"]["emr"]["task_agnostic"] is None
    again = Results.from_dict(found)
    assert again.model("emr").needs_task
    assert again.to_dict() == found


def test_two_looks_at_a_run_are_joined_with_the_first_one_preferred():
    one, other = make_results(models=("magmax", "expert")), make_results(models=("ties", "magmax", "expert"))
    one.model("magmax").data = "mine"
    one.orders = {"seed": 0, "models": {"magmax": 1}}
    other.orders = {"seed": 0, "models": {"ties": 2, "magmax": 3}}
    other.diagnostics, other.group = {"tasks": []}, "g"
    joined = one.joined(other)
    assert sorted(joined.mergers) == ["magmax", "ties"]
    assert joined.model("magmax").data == "mine"
    assert joined.orders["models"] == {"magmax": 1, "ties": 2}
    assert (joined.diagnostics, joined.group) == ({"tasks": []}, "g")
