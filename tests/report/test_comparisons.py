"""Folders of ``clmerge compare``: from reading to what is drawn."""

import pytest
from support.comparisons import make_diagnostics, write_comparison
from support.run_folders import write_run

from clmerge.figures.drawing import draw, draw_panels
from clmerge.report import read_study
from clmerge.report.diagnostics import diagnostic_figures
from clmerge.report.figures import common_figures, make_figures
from clmerge.report.ledger import merged_of, sources_of
from clmerge.report.page import make_views, render_page
from clmerge.report.searches import chosen_of, order_spread


def figures_of(study):
    return {figure.name: figure for figure in (*make_figures(study, "task_agnostic"), *common_figures(study))}


def test_a_comparison_of_one_run_keeps_its_numbers(tmp_path):
    document = write_comparison(tmp_path)
    study = read_study([tmp_path / "compare"])
    assert [entry.name for entry in study.entries] == ["magmax", "ties", "opcm", "expert", "task_oracle", "zero_shot"]
    assert [entry.name for entry in study.mergers] == ["magmax", "ties", "opcm"]
    magmax = study.mergers[0]
    found = document["runs"][0]["models"]["magmax"]
    assert magmax.figure("gap_to_experts", "task_aware").mean == found["task_aware"]["gap_to_experts"][-1]
    assert magmax.figure("worst_task", "task_aware").mean == min(found["task_aware"]["R"][-1])
    assert [spread.mean for spread in magmax.bytes_kept()] == found["bytes_kept"]
    assert [spread.mean for spread in magmax.merge_seconds()] == found["merge_seconds"]
    assert study.runs[0].num_parameters == 23  # the run it was made from is still there


def test_runs_of_a_comparison_are_repetitions(tmp_path):
    document = write_comparison(tmp_path, num_runs=2)
    study = read_study([tmp_path / "compare"])
    magmax = study.mergers[0]
    wanted = [document["runs"][i]["models"]["magmax"]["task_agnostic"]["average_accuracy"][-1] for i in range(2)]
    assert magmax.figure("average_accuracy", "task_agnostic").values == tuple(wanted)
    assert [run.results.seed for run in magmax.runs] == [0, 1]
    assert study.reference(magmax, "zero_shot").runs == magmax.runs
    assert merged_of(study)[0].settings == {"scale": "0.5 or 1.5"}


def test_a_run_and_its_comparison_are_one_run(tmp_path):
    write_comparison(tmp_path)
    study = read_study([tmp_path / "run0", tmp_path / "compare"])
    assert len(study.runs) == 1
    assert all(len(entry.runs) == 1 for entry in study.entries)
    assert study.mergers[2].name == "opcm"


def test_comparisons_whose_runs_are_gone_are_grouped_as_they_say(tmp_path):
    write_comparison(tmp_path, num_runs=2)
    for index in range(2):
        (tmp_path / f"run{index}").rename(tmp_path / f"elsewhere{index}")
    study = read_study([tmp_path / "compare"])
    assert len(study.mergers[0].runs) == 2
    facts = [source.facts for source in sources_of(study)]
    assert all("which is not there" in found["Folder"] for found in facts)
    assert [found["Seed"] for found in facts] == ["0", "1"]


def test_searches_are_drawn_with_what_was_chosen(tmp_path):
    write_comparison(tmp_path, num_runs=2)
    study = read_study([tmp_path / "compare"])
    figures = figures_of(study)
    (panel,) = figures["searches"].chart.panels
    (line,) = panel.lines
    assert (panel.title, line.name, list(line.chosen)) == ("scale", "magmax", [2])
    assert line.points == [(0.1, (0.5, 0, 2)), (0.5, (0.6, 0, 2)), (1.0, (0.7, 0, 2))]
    dots = figures["search_ties"].chart.panels
    assert [panel.title for panel in dots] == ["scale", "density"]
    assert [list(panel.lines[0].chosen) for panel in dots] == [[3, 7], [3, 7]]  # the best point of either run
    best, used = figures["scale_by_task"].chart.panels
    assert [spread.mean for _, spread in best.lines[0].points] == [0.5, 0.4, 0.3]
    assert not used.lines[0].points[0][1].is_defined
    chosen = chosen_of(study)
    assert [(one.name, one.run, one.chosen) for one in chosen[:2]] == [
        ("magmax", "run0", "scale=1"),
        ("magmax", "run1", "scale=1"),
    ]
    assert chosen[2].tried == "4 points: scale 0.5 to 1, density 0.1 to 0.2"


def test_orders_are_drawn_for_rules_that_mind_them(tmp_path):
    write_comparison(tmp_path)
    study = read_study([tmp_path / "compare"])
    (line,) = figures_of(study)["orders"].chart.panels[0].lines
    assert [spread.mean for _, spread in line.points] == [0.8, 0.7, 0.9]
    assert order_spread(study.mergers[2], "task_aware").std == pytest.approx(0.1)
    assert not order_spread(study.mergers[0], "task_aware").is_defined


def test_diagnostics_are_drawn_as_they_are(tmp_path):
    write_comparison(tmp_path, diagnostics=make_diagnostics())
    study = read_study([tmp_path / "compare"])
    figures = {figure.name: figure for figure in diagnostic_figures(study)}
    assert list(figures) == [
        "cosine",
        "sign_conflict",
        "subspace_overlap",
        "layers_cosine",
        "layers_norm",
        "effective_rank",
        "barriers",
        "disentanglement",
        "disagreement",
        "representation_bias",
    ]
    assert figures["cosine"].chart.grids[0].cells[0][2].mean == 0.25
    assert figures["layers_cosine"].chart.rows == ["blocks.0", "blocks.1"]
    assert figures["layers_cosine"].chart.grids[0].cells[0][0].mean == 0.25  # the undefined one is no zero
    barriers = figures["barriers"].chart.panels
    assert [panel.lines[0].name for panel in barriers] == ["expert", "magmax", "expert"]
    assert [spread.mean for _, spread in barriers[0].lines[0].points] == [0.25, 0.5625, 0.0]
    assert figures["disagreement"].chart.rows == ["base", "magmax"]
    for figure in figures.values():
        draw(figure.chart).canvas.draw()
        assert all("<svg" in drawing for _, drawing in draw_panels(figure.chart))


def test_everything_is_on_the_page(tmp_path):
    write_comparison(tmp_path, num_runs=2, diagnostics=make_diagnostics())
    study = read_study([tmp_path / "compare"])
    diagnostics = diagnostic_figures(study)
    text = render_page(study, make_views(study), common_figures(study), diagnostics, title="t", folder="f")
    for name in ("searches", "search_ties", "scale_by_task", "merge_seconds", "bytes_growth", "barriers", "cosine"):
        assert f'id="{name}"' in text
    assert "Chosen on validation images" in text
    assert "What takes images was measured on 30 validation images, task-agnostic." in text
    assert ">nan<" not in text


def test_half_a_comparison_is_refused(tmp_path):
    write_run(tmp_path / "run")
    file = tmp_path / "run" / "results.json"
    file.write_text(file.read_text().replace('"runs": [', '"runs": [{"name": "a"}, ', 1))
    with pytest.raises(ValueError, match="expected the results of a run in"):
        read_study([tmp_path / "run"])
