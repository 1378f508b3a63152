import json

import pytest
from support.comparisons import write_comparison

from clmerge.report import read_study
from clmerge.report.figures import common_figures
from clmerge.report.page import make_views, render_page
from clmerge.report.probes import probe_figures, probe_table


@pytest.fixture
def study(tmp_path):
    document = write_comparison(tmp_path, num_tasks=3)
    for index, (name, model) in enumerate(document["runs"][0]["models"].items()):
        finished = len(model["task_aware"]["R"])
        model["probes"] = {
            "attack_success": {
                "value": 0.25 * (index % 4),
                "curve": [0.5] * (finished - 1) + [0.25 * (index % 4)],
                "per_task": [0.25 * (index % 4), None, None],
                "n": [36, 0, 0],
                "better": "lower",
                "share": True,
                "probe": "AttackSuccess(target=0)",
            }
        }
        if name == "zero_shot":
            del model["probes"]["attack_success"]["curve"]
    (tmp_path / "compare" / "results.json").write_text(json.dumps(document))
    return read_study([tmp_path / "compare"])


def test_the_table_has_every_model_and_marks_the_best_merger(study):
    table = probe_table(study)
    assert table.names == ["attack success"]
    assert "AttackSuccess(target=0); lower is better" in table.hints
    cells = {entry.name: cells[0] for entry, cells in table.rows}
    mergers = [entry.name for entry in study.mergers]
    lowest = min(float(cells[name].exact) for name in mergers)
    assert [name for name in mergers if cells[name].is_best] == [
        name for name in mergers if float(cells[name].exact) == lowest
    ]
    assert "over 36, 95 % Wilson interval" in cells[mergers[0]].hint
    assert table.csv.startswith("model,attack_success\n")


def test_figures_and_page(study):
    assert [figure.name for figure in probe_figures(study)] == ["probe_attack_success", "probe_attack_success_by_task"]
    page = render_page(study, make_views(study), common_figures(study), [], title="t", folder="f")
    assert "What probes found" in page
    assert 'id="probe_attack_success"' in page


def test_a_share_that_is_better_when_higher_is_drawn_against_accuracy(study, tmp_path):
    document = json.loads((tmp_path / "compare" / "results.json").read_text())
    for model in document["runs"][0]["models"].values():
        model["probes"]["attack_success"] |= {"better": "higher"}
    (tmp_path / "compare" / "results.json").write_text(json.dumps(document))
    turned = read_study([tmp_path / "compare"])
    figure = next(one for one in probe_figures(turned) if one.name == "probe_attack_success_against_accuracy")
    dots = {line.name: line.points for line in figure.chart.panels[0].lines}
    entry = turned.mergers[0]
    ((x, value),) = dots[entry.name]
    assert x == entry.figure("average_accuracy", turned.evaluation).mean
    assert value.mean == entry.runs[0].results.model(entry.model).probes["attack_success"]["value"]
    assert len(dots) == len(turned.entries)


def test_without_probes_nothing_is_shown(tmp_path):
    write_comparison(tmp_path, num_tasks=3)
    plain = read_study([tmp_path / "compare"])
    assert probe_table(plain) is None
    assert list(probe_figures(plain)) == []
    assert "What probes found" not in render_page(plain, make_views(plain), [], [], title="t", folder="f")
