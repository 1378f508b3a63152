import itertools

import matplotlib
import numpy as np
import pytest
from made_up import make_results
from matplotlib.image import imread

from clmerge.figures import (
    plot_average_accuracy,
    plot_final_accuracy,
    plot_forgetting_curves,
    plot_matrices,
    plot_matrix,
    save_plots,
)
from clmerge.figures.curves import _spread
from clmerge.figures.style import ink_on, look


def texts(panel):
    return [text.get_text() for text in panel.texts]


def test_matrix_shows_every_number_in_percent():
    results = make_results(3)
    panel = plot_matrix(results, "expert").axes[0]
    expected = [f"{100 * value:.1f}" for value in results.matrix("expert").ravel()]
    assert texts(panel) == expected
    assert panel.images[0].get_clim() == (0, 100)
    assert [label.get_text() for label in panel.get_xticklabels()] == results.tasks
    assert [label.get_text() for label in panel.get_yticklabels()] == ["1", "2", "3"]


def test_matrix_of_many_tasks_rounds_and_marks_what_is_undefined():
    panel = plot_matrix(make_results(12, finished=2, growing=True), "magmax").axes[0]
    assert texts(panel)[:3] == ["90", "-", "-"]
    assert len(texts(panel)) == 2 * 12


def test_matrices_share_one_scale():
    figure = plot_matrices(make_results(3), ["magmax", "expert"], setting="task_aware")
    assert [panel.get_title() for panel in figure.axes[:2]] == ["magmax", "expert"]
    assert figure.axes[2].get_ylabel() == "accuracy in %, task-aware"
    with pytest.raises(ValueError, match="one or more models"):
        plot_matrices(make_results(3), [])
    with pytest.raises(ValueError, match="got 'tise'"):
        plot_matrix(make_results(3), "tise")


def test_forgetting_curves_hold_the_columns_of_every_matrix():
    results = make_results(7, finished=4)
    panels = [panel for panel in plot_forgetting_curves(results).axes if panel.get_visible()]
    assert [panel.get_title() for panel in panels] == results.tasks
    for task, panel in enumerate(panels):
        drawn = [line.get_ydata() for line in panel.lines[1:]]
        for index, model in enumerate(reversed(results.models)):
            column = results.matrix(model)[:, task] * 100
            np.testing.assert_array_equal(drawn[2 * index], column)
            np.testing.assert_array_equal(drawn[2 * index + 1], column[task:])
        assert panel.get_ylim() == (-2, 102)


def test_average_accuracy_labels_its_lines():
    results = make_results(4)
    panel = plot_average_accuracy(results).axes[0]
    finals = {model: results.figures(model)["average_accuracy"][-1] for model in results.models}
    assert sorted(texts(panel)) == sorted(f"{model} {100 * value:.1f}" for model, value in finals.items())
    styles = {line.get_linestyle() for line in panel.lines if line.get_ydata()[-1] == 100 * finals["zero_shot"]}
    assert styles == {"--"}


@pytest.mark.parametrize(("num_tasks", "bars"), [(3, True), (20, False)])
def test_final_accuracy_is_bars_or_dots(num_tasks, bars):
    results = make_results(num_tasks)
    panel = plot_final_accuracy(results).axes[0]
    if bars:
        heights = [patch.get_height() for container in panel.containers for patch in container]
    else:
        assert not panel.containers
        heights = [height for line in panel.lines[: len(results.models)] for height in line.get_ydata()]
    expected = [100 * value for model in results.models for value in results.matrix(model)[-1]]
    assert heights == pytest.approx(expected)


def test_save_plots_writes_pngs_and_leaves_pyplot_alone(tmp_path):
    from matplotlib import pyplot

    backend, figures = matplotlib.get_backend(), pyplot.get_fignums()
    files = save_plots(make_results(2, ("magmax", "expert")), tmp_path / "plots")
    overview = ["average_accuracy.png", "final_accuracy.png", "forgetting_curves.png", "matrices.png"]
    expected = [
        *overview,
        "matrix_expert.png",
        "matrix_magmax.png",
        *(f"task_aware/{name}" for name in overview),
    ]
    found = sorted(path.relative_to(tmp_path / "plots").as_posix() for path in tmp_path.rglob("*.*"))
    assert found == sorted(expected)
    assert sorted(files) == sorted(tmp_path / "plots" / name for name in expected)
    for file in files:
        pixels = imread(file)
        assert pixels.shape[0] > 200
        assert pixels.shape[1] > 400
        assert pixels[..., :3].std() > 0.02
    assert (matplotlib.get_backend(), pyplot.get_fignums()) == (backend, figures)


def test_labels_lie_inside_the_picture():
    results = make_results(5, names="digits {0} and {0} again")
    for figure in (
        plot_matrices(results, ["magmax", "expert"]),
        plot_forgetting_curves(results),
        plot_average_accuracy(results),
        plot_final_accuracy(results),
    ):
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        assert box.x0 >= -0.01
        assert box.y0 >= -0.01
        assert box.x1 <= width + 0.01
        assert box.y1 <= height + 0.01


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one finished task"):
        save_plots(make_results(finished=0), tmp_path)


def test_models_look_the_same_everywhere_and_different_from_each_other():
    results = make_results(1, tuple(f"merger{i}" for i in range(20)))
    looks = [look(results, model)[:2] for model in results.models]
    assert len(set(looks)) == len(looks)


def test_spread_keeps_the_order_and_a_gap():
    spread = _spread({"a": 50.0, "b": 51.0, "c": 20.0, "d": 50.5}, gap=5.0)
    assert sorted(spread, key=spread.__getitem__) == ["c", "a", "d", "b"]
    heights = sorted(spread.values())
    assert all(high - low >= 5 - 1e-9 for low, high in itertools.pairwise(heights))
    assert spread["c"] == 20
    assert spread["d"] == pytest.approx(50.5)


def test_ink_contrasts_with_its_background():
    assert ink_on((1.0, 1.0, 0.0, 1.0)) == "black"
    assert ink_on((0.2, 0.0, 0.3, 1.0)) == "white"
