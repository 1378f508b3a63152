import json

import pytest
from support.comparisons import write_comparison

from clmerge.figures.drawing import draw
from clmerge.report import read_study
from clmerge.report.figures import common_figures
from clmerge.report.fronts import front_figures, fronts_of
from clmerge.report.page import make_views, render_page
from clmerge.runs.comparison.table import comparison_lines


def study_of(folder, num_tasks, method="nsga", front=(0, 2)):
    """A comparison whose first search has a front."""
    document = write_comparison(folder, num_tasks=num_tasks)
    search = document["runs"][0]["searches"][0]
    search["method"], search["front"] = method, list(front)
    for index, point in enumerate(search["points"]):
        point["accuracy"] = [round(0.5 + 0.1 * index, 1), *[round(0.9 - 0.1 * index, 1)] * (num_tasks - 1)]
    (folder / "compare" / "results.json").write_text(json.dumps(document))
    return read_study([folder / "compare"])


@pytest.mark.parametrize("num_tasks", [2, 3])
def test_a_front_is_a_table_and_a_figure(num_tasks, tmp_path):
    study = study_of(tmp_path, num_tasks)
    (front,) = fronts_of(study)
    others = [0.9] * (num_tasks - 1), [0.7] * (num_tasks - 1)
    assert front.rows == [("scale=0.1", [0.5, *others[0]], False), ("scale=1", [0.7, *others[1]], True)]
    (figure,) = front_figures(study)
    assert figure.name == "front_magmax"
    lines = figure.chart.panels[0].lines
    if num_tasks == 2:
        assert [(x, value.mean) for x, value in lines[0].points] == [(0.5, 0.9), (0.7, 0.7)]
        assert list(lines[0].chosen) == [1]
    else:
        assert [[value.mean for _, value in line.points] for line in lines] == [[0.7, 0.7, 0.7], [0.5, 0.9, 0.9]]
        assert [line.faint for line in lines] == [False, True]
    assert draw(figure.chart)
    assert figure.name in [each.name for each in common_figures(study)]


def test_the_page_and_the_terminal_show_it(tmp_path):
    study = study_of(tmp_path, 3)
    page = render_page(study, make_views(study), common_figures(study), [], title="t", folder="f")
    assert "What magmax can trade: 2 points that no other one beats on all tasks" in page
    assert "scale=1 (chosen)" in page
    lines, _ = comparison_lines(study, "task_agnostic")
    assert "  scale=0.1: 50.0 90.0 90.0" in lines


@pytest.mark.parametrize("changes", [{"method": "grid"}, {"front": (0,)}, {"front": (0, 99)}])
def test_searches_for_one_best_point_have_no_front(changes, tmp_path):
    assert fronts_of(study_of(tmp_path, 3, **changes)) == []
