import io

import pytest
from made_up import make_results
from rich.console import Console

from clmerge.results.results import Results
from clmerge.results.table import final_text, render_table, render_text


def printed(results, width=80, **options):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render_table(results, width=width, **options))
    return console.file.getvalue()


def test_five_tasks_have_a_column_each_in_eighty_columns():
    results = make_results(5, ("magmax", "ties_density0.1", "weight_average", "expert"), names="{} long name")
    lines = render_text(results).splitlines()
    assert lines[1].split() == ["model", "T1", "T2", "T3", "T4", "T5", "average", "forget", "BWT"]
    assert lines[2].split()[:2] == ["magmax", "*"]
    assert lines[-1].startswith("T1 1 long name, T2")
    assert max(map(len, lines)) <= 80
    for line in (line for line in printed(results).splitlines() if "magmax" in line):
        assert line.split() == lines[2].split()


@pytest.mark.parametrize("width", [80, 100])
def test_twenty_tasks_are_collapsed(width):
    results = make_results(20, ("magmax", "ties_density0.1", "expert"))
    text = render_text(results, width=width)
    assert "first  latest  worst  average" in text
    assert "first, latest and worst of the 20 tasks" in text
    row = next(line for line in text.splitlines() if line.startswith("expert")).split()
    assert [float(cell) for cell in row[1:4]] == pytest.approx(
        [100 * results.matrix("expert")[-1, j] for j in (0, 19, 0)], abs=0.051
    )
    assert max(map(len, printed(results, width).splitlines())) <= width


def test_numbers_are_those_of_the_results():
    results = make_results(3, names="t{}")
    row = next(line for line in render_text(results, setting="task_aware").splitlines() if "ties" in line).split()
    figures = results.figures("ties_density0.1", "task_aware")
    expected = [
        *figures["R"][-1],
        figures["average_accuracy"][-1],
        figures["forgetting"],
        figures["backward_transfer"],
    ]
    assert [float(cell) for cell in row[1:]] == pytest.approx([100 * value for value in expected], abs=0.051)


def test_only_tasks_seen_so_far_are_shown_and_undefined_is_a_dash():
    text = render_text(make_results(5, finished=1, growing=True, names="t{}"))
    lines = text.splitlines()
    assert lines[0] == "Accuracy in % after task 1 of 5, task-agnostic"
    assert lines[1].split() == ["model", "t1", "average", "forget", "BWT"]
    assert lines[2].split() == ["magmax", "*", "90.0", "90.0", "-", "-"]


def test_text_is_ascii_and_brackets_in_names_are_no_markup():
    results = Results(["a"], classes=[["0"]])
    results.add_row("ties[bold]", [1.0], [1.0])
    assert render_text(results).isascii()
    assert "ties[bold] *" in printed(results)
    assert "100.0" in printed(results)


def test_long_names_of_tasks_are_shown_by_their_classes():
    signs = ["100 km/h speed limit", "120 km/h speed limit", *"abcdef"]
    results = Results(["100_km_h_speed_limit-120_km_h_speed_limit-and-6", "zero"], classes=[signs, ["0"]])
    results.add_row("ties", [1.0, 0.25], [1.0, 0.5])
    results.add_row("ties", [1.0, 0.25], [1.0, 0.5])
    lines = render_text(results).splitlines()
    assert lines[1].split()[:3] == ["model", "T1", "T2"]
    assert lines[-1] == "T1 100 km/h speed limit ... (8 classes), T2 zero"
    row = {"task_agnostic": [1.0, 0.25], "task_aware": [1.0, 0.5]}
    assert "T1 100 km/h speed limit ... (8 classes), T2 zero" in final_text(results, {"ties": row}, split="test")
    assert results.to_dict()["tasks"][0] == "100_km_h_speed_limit-120_km_h_speed_limit-and-6", (
        "what identifies it stays"
    )


def test_finished_models_say_what_they_looked_at():
    results = Results(["a", "b"], classes=[["0"], ["1"]])
    rows = {}
    for name in ("ties", "adamerging", "expert"):
        results.add_row(name, [1.0, 0.5], [1.0, 0.5])
        rows[name] = {"task_agnostic": [1.0, 0.5], "task_aware": [1.0, 0.5]}
    assert "data" not in final_text(results, rows, split="test")
    results.describe("adamerging", data="val(unlabelled)")
    lines = [line.split() for line in final_text(results, rows, split="test").splitlines()]
    assert [line[-1] for line in lines[1:5]] == ["data", "none", "val(unlabelled)", "-"]
    assert lines[3][:-1] == ["adamerging", "100.0", "50.0", "75.0"]


def test_best_is_not_marked_without_mergers():
    results = Results(["a"], classes=[["0"]])
    results.add_row("expert", [0.9], [1.0])
    assert "*" not in render_text(results)


def test_nothing_to_show_is_an_error():
    with pytest.raises(ValueError, match="at least one finished task"):
        render_text(make_results(finished=0))


def test_what_models_looked_at_is_a_column_where_one_did():
    results = make_results(3, ("magmax", "adamerging", "expert"), names="t{}")
    assert "data" not in render_text(results)
    results.describe("adamerging", data="val(10 per class, unlabelled)")
    lines = render_text(results, width=120).splitlines()
    assert lines[1].split()[-1] == "data"
    shown = {line.split()[0]: line[-40:] for line in lines[2:5]}
    assert shown["adamerging"].endswith("val(10 per class, unlabelled)")
    assert shown["magmax"].endswith(" none")
    assert shown["expert"].endswith(" -")
