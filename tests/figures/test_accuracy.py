import matplotlib
import numpy as np
import pytest
from made_up import answer, make_results
from matplotlib.colors import to_hex
from matplotlib.image import imread

from clmerge.figures import (
    plot_average_accuracy,
    plot_final_accuracy,
    plot_forgetting_curves,
    plot_matrices,
    plot_matrix,
    save_plots,
)
from clmerge.figures.accuracy import _model, forgetting_chart
from clmerge.figures.looks import HEAT, look_of
from clmerge.results.results import Results


def texts(panel):
    return [text.get_text() for text in panel.texts]


def dots(panel, model, results):
    """The heights of the dots of one model, from left to right."""
    look = look_of(model, results.mergers.index(model) if model in results.mergers else None)
    lines = [line for line in panel.lines if line.get_marker() == look.marker and line.get_color() == look.color]
    points = sorted(point for line in lines for point in zip(*line.get_data(), strict=True))
    return [height for _, height in points]


def test_matrix_shows_every_number_in_percent():
    results = make_results(3)
    figure = plot_matrix(results, "expert")
    panel, scale = figure.axes
    matrix = results.matrix("expert")
    assert texts(panel) == [f"{100 * value:.1f}" for value in matrix.ravel()]
    colors = panel.collections[0].to_rgba(panel.collections[0].get_array()).reshape(-1, 4)
    assert list(map(to_hex, colors)) == [to_hex(HEAT(value)) for value in matrix.ravel()]
    assert scale.get_ylim() == (0, 1)
    assert scale.get_ylabel() == "accuracy in %,\ntask-agnostic"
    assert [label.get_text() for label in panel.get_xticklabels()] == results.tasks
    assert [label.get_text() for label in panel.get_yticklabels()] == ["1", "2", "3"]


def test_matrix_of_many_tasks_rounds_and_marks_what_is_undefined():
    panel = plot_matrix(make_results(12, finished=2, growing=True), "magmax").axes[0]
    assert texts(panel)[:3] == ["90", "-", "-"]
    assert len(texts(panel)) == 2 * 12


def test_matrices_share_one_scale():
    figure = plot_matrices(make_results(3), ["magmax", "expert"], setting="task_aware")
    assert [panel.get_title(loc="left") for panel in figure.axes[:2]] == ["magmax", "expert"]
    assert figure.axes[2].get_ylabel() == "accuracy in %,\ntask-aware"
    with pytest.raises(ValueError, match="one or more models"):
        plot_matrices(make_results(3), [])
    with pytest.raises(ValueError, match="got 'tise'"):
        plot_matrix(make_results(3), "tise")


def test_forgetting_curves_hold_the_columns_of_every_matrix():
    results = make_results(7, finished=4)
    panels = plot_forgetting_curves(results).axes
    assert [panel.get_title(loc="left") for panel in panels] == results.tasks
    for task, panel in enumerate(panels):
        assert panel.lines[0].get_xdata() == [task + 1, task + 1]
        for model in results.models:
            np.testing.assert_array_equal(dots(panel, model, results), results.matrix(model)[:, task])
        assert panel.get_ylim() == (0, 1)


def test_of_many_tasks_some_are_drawn():
    tasks = [f"t{task}" for task in range(7)]
    chart = forgetting_chart([], tasks, most=3)
    assert [panel.title for panel in chart.panels] == ["t0", "t3", "t6"]
    assert [panel.rule for panel in chart.panels] == [1, 4, 7]
    assert len(forgetting_chart([], tasks, most=7).panels) == 7


def test_average_accuracy_says_where_its_lines_end():
    results = make_results(4)
    figure = plot_average_accuracy(results)
    finals = {model: results.figures(model)["average_accuracy"][-1] for model in results.models}
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == [f"{model} {100 * value:.1f}" for model, value in finals.items()]
    for model in results.models:
        assert dots(figure.axes[0], model, results) == results.figures(model)["average_accuracy"]


@pytest.mark.parametrize("num_tasks", [3, 20])
def test_final_accuracy_has_every_model_beside_every_task(num_tasks):
    results = make_results(num_tasks)
    panel = plot_final_accuracy(results).axes[0]
    assert [label.get_text() for label in panel.get_xticklabels()] == results.tasks
    for model in results.models:
        assert dots(panel, model, results) == list(results.matrix(model)[-1])
    places = sorted(
        {round(x, 6) for line in panel.lines if len(line.get_xdata()) == num_tasks for x in line.get_xdata()}
    )
    assert len(places) == num_tasks * len(results.models)
    assert [round(place) for place in places] == sorted([*range(1, num_tasks + 1)] * len(results.models))


def test_save_plots_writes_pngs_and_leaves_pyplot_alone(tmp_path):
    from matplotlib import pyplot

    backend, figures = matplotlib.get_backend(), pyplot.get_fignums()
    files = save_plots(answer(make_results(2, ("magmax", "expert"))), tmp_path / "plots")
    overview = ["average_accuracy.png", "confusion.png", "final_accuracy.png", "forgetting_curves.png", "matrices.png"]
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


@pytest.mark.parametrize("names", ["digits {0} and {0} again", "{}"])
@pytest.mark.parametrize("num_tasks", [1, 2, 5, 30])
def test_labels_lie_inside_the_picture(num_tasks, names):
    results = make_results(num_tasks, names=names)
    for figure in (
        plot_matrix(results, "magmax"),
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


def test_curves_have_the_moments_at_which_something_was_evaluated():
    results = Results(["a", "b", "c", "d"], classes=[["0"], ["1"], ["2"], ["3"]])
    results.set_zero_shot([0.25] * 4, [0.5] * 4)
    for value in (None, 0.5, None, 1.0):
        results.add_row("magmax", [value] * 4, [value] * 4)
    models = [_model(results, model, "task_aware") for model in ("magmax", "zero_shot")]
    chart = forgetting_chart(models, results.tasks)
    assert [[x for x, _ in line.points] for line in chart.panels[0].lines] == [[1.0, 2.0, 4.0]] * 2
    assert len(chart.panels) == 4
