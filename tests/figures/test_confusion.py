import math

import pytest
from made_up import answer, make_results

from clmerge.figures import plot_confusion
from clmerge.figures.confusion import MOST_SHOWN, confused, confusion_chart
from clmerge.results.confusion import Confusion


def test_rows_are_shares_of_the_images_of_a_class():
    found = Confusion([4, 2, 0], [1, 2, 0], [(0, 1, 2), (0, None, 1)])
    chart = confusion_chart({"magmax": found}, ["ant", "bee", "cat"])
    rows = [[value.mean for value in row] for row in chart.grids[0].cells]
    assert rows[:2] == [[0.25, 0.5, 0.0], [0.0, 1.0, 0.0]]
    assert all(math.isnan(value) for value in rows[2]), "no image, no share"
    assert (chart.rows, chart.columns) == (["ant", "bee", "cat"], ["ant", "bee", "cat"])
    assert chart.tip(chart.grids[0], 0, 1) == "magmax, class ant, taken for bee: 50.00 %"


def test_of_many_classes_those_most_mistakes_are_about_are_shown():
    size = 50
    found = Confusion([10] * size, [10 - (i % 5 == 0) for i in range(size)], [(i, i + 1, 1) for i in range(0, size, 5)])
    chart = confusion_chart({"magmax": found}, [f"c{i}" for i in range(size)])
    assert chart.rows == [f"c{i}" for i in range(size) if i % 5 in (0, 1)]
    assert len(chart.rows) == MOST_SHOWN
    assert chart.row_name == "class (20 of 50)"


def test_pictures_show_models_whose_answers_were_counted():
    results = answer(make_results(2))
    figure = plot_confusion(results, ["magmax", "expert"], setting="task_aware")
    panel = figure.axes[0]
    assert panel.get_title(loc="left") == "magmax"
    assert [label.get_text() for label in panel.get_yticklabels()] == results.class_names
    assert figure.axes[2].get_ylabel() == "images of the class in %,\ntask-aware"
    assert confused(results, results.models) == ["magmax", "ties_density0.1", "expert"]
    with pytest.raises(ValueError, match="expected answers of 'zero_shot' by pairs of classes, got none"):
        plot_confusion(results, ["zero_shot"])
