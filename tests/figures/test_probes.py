import math

import pytest
from made_up import make_results

from clmerge.figures import plot_files, plot_probe, probe_charts
from clmerge.figures.charts import HeatChart, LineChart
from clmerge.results.measured import Measured
from clmerge.results.probe_table import probe_text, wilson
from clmerge.results.results import Results


def probed(tasks=3):
    results = make_results(tasks)
    names = results.tasks
    for index, model in enumerate(results.models):
        per_task = [0.1 * index] * len(names)
        if model != "expert":
            results.add_probe(
                model, "attack", Measured(0.1 * index, per_task, n=[10] * len(names)), share=True, better="lower"
            )
        results.add_probe(model, "late", Measured(2.0 + index, [math.nan, *[2.0 + index] * (len(names) - 1)], n=4))
    return results


def test_a_probe_of_the_last_task_alone_is_a_heatmap_and_others_are_curves():
    results = probed()
    for model in results.mergers:
        results.model(model).probes["attack"]["curve"] = [0.5, 0.25, 0.0]
    charts = probe_charts(results)
    assert isinstance(charts["attack"], LineChart)
    assert charts["attack"].y_unit == "share"
    assert [value.mean for _, value in charts["attack"].panels[0].lines[0].points] == [0.5, 0.25, 0.0]
    shown = [text.get_text() for text in plot_probe(results, "attack").legends[0].get_texts()]
    assert shown[0] == f"{results.mergers[0]} 0.0"
    for model in results.mergers:
        results.model(model).probes["late"]["curve"] = [2.0, 3.0, 0.0203]
    shown = [text.get_text() for text in plot_probe(results, "late").legends[0].get_texts()]
    assert shown[0] == f"{results.mergers[0]} 0.0203", "a number is no percentage"
    for model in results.mergers:
        results.model(model).probes["late"]["curve"] = [math.nan, math.nan, 0.0203]
    assert isinstance(charts["late"], HeatChart)
    assert charts["late"].rows == results.models
    assert math.isnan(charts["late"].grids[0].cells[0][0].mean)
    assert plot_probe(results, "late").axes
    assert {file.name for file in plot_files(results, "f")} >= {"probe_attack.png", "probe_late.png"}
    with pytest.raises(ValueError, match="got 'atack'"):
        plot_probe(results, "atack")


def test_the_text_has_shares_with_intervals_and_a_dash_where_nothing_was_measured():
    text = probe_text(probed())
    rows = {line.split()[0]: line for line in text.splitlines()[2:]}
    low, high = wilson(0.1, 30)
    assert f"10.0 [{100 * low:.1f}, {100 * high:.1f}]" in text
    assert " - " in rows["expert"]
    assert probe_text(make_results(2)) == ""


def test_curves_of_an_earlier_moment_end_there():
    results = Results(["a", "b"], classes=[["0"], ["1"]])
    for value in (0.5, 0.75):
        results.add_row("ties", [1.0, 0.5], [1.0, 0.5])
        results.add_probe("ties", "attack", Measured(value, [value, value], n=[1, 1]), share=True)
    assert results.model("ties").probes["attack"]["curve"] == [0.5, 0.75]
    earlier = results.until(1).model("ties").probes["attack"]
    assert earlier["curve"] == [0.5]
    assert earlier["value"] == 0.5
    assert "per_task" not in earlier
    assert Results.from_dict(results.to_dict()).to_dict() == results.to_dict()


def test_a_probe_that_is_first_measured_later_has_gaps_before():
    results = Results(["a", "b"], classes=[["0"], ["1"]])
    for _ in range(2):
        results.add_row("ties", [1.0, 0.5], [1.0, 0.5])
    results.add_probe("ties", "late", Measured(0.25, n=3))
    curve = results.model("ties").probes["late"]["curve"]
    assert math.isnan(curve[0])
    assert curve[1] == 0.25
