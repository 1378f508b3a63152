"""A run beside its comparison: what is the same model, and what is not."""

import itertools
import json

import pytest
from support.comparisons import make_diagnostics, write_comparison
from support.records import record
from support.run_folders import config_of, write_run

from clmerge.report import paper_table, read_study
from clmerge.report.diagnostics import diagnostic_figures
from clmerge.report.figures import common_figures
from clmerge.report.tables import table_csv


@pytest.fixture
def folders(tmp_path):
    """A run, and a comparison that searched the scale of two of its mergers and found other accuracies."""
    document = write_comparison(tmp_path, diagnostics=make_diagnostics())
    for setting in ("task_agnostic", "task_aware"):
        figures = document["runs"][0]["models"]["magmax"][setting]
        figures["average_accuracy"] = [0.75, 0.75, 0.75]
        figures["R"] = [[0.75] * 3] * 3
    (tmp_path / "compare" / "results.json").write_text(json.dumps(document))
    return tmp_path


def average(study, name):
    (entry,) = [entry for entry in study.entries if entry.name == name]
    return entry.figure("average_accuracy", "task_agnostic").mean


def test_tuned_rows_stand_beside_the_runs_own(folders):
    own = record(folders / "run0")
    study = read_study([folders / "run0", folders / "compare"])
    names = [entry.name for entry in study.mergers]
    assert sorted(names) == ["magmax", "magmax (tuned)", "opcm", "ties", "ties (tuned)"]
    assert average(study, "magmax (tuned)") == 0.75
    assert average(study, "magmax") == own["models"]["magmax"]["task_agnostic"]["average_accuracy"][-1]
    searches = next(figure for figure in common_figures(study) if figure.name == "searches")
    assert [line.name for panel in searches.chart.panels for line in panel.lines] == ["magmax (tuned)"]
    (barriers,) = [figure for figure in diagnostic_figures(study) if figure.name == "barriers"]
    assert "magmax (tuned)" in {line.name for line in barriers.chart.models}


def test_the_order_of_the_folders_changes_nothing(folders):
    write_run(folders / "run1", config=config_of(seed=1), shift=0.1)
    given = [folders / "run0", folders / "compare", folders / "run1"]
    shown = set()
    for order in itertools.permutations(given):
        study = read_study(order)
        shown.add((paper_table(study, "task_agnostic", "md"), table_csv(study, "task_aware")))
    assert len(shown) == 1


def test_a_comparison_alone_keeps_plain_names(folders):
    assert [entry.name for entry in read_study([folders / "compare"]).mergers] == ["magmax", "ties", "opcm"]


def test_the_same_folder_twice_is_once(folders):
    once, twice = read_study([folders / "run0"]), read_study([folders / "run0"] * 2)
    assert table_csv(once, "task_agnostic") == table_csv(twice, "task_agnostic")


def test_other_settings_of_a_merger_are_another_row(tmp_path):
    for index, density in enumerate((0.1, 0.2, 0.2)):
        mergers = [{"class_path": "clmerge.merging.TIES", "init_args": {"density": density}}]
        config = config_of(seed=index, mergers=mergers)
        write_run(tmp_path / f"run{index}", config=config, models=("ties", "expert"), shift=0.1 * index)
    study = read_study([tmp_path / f"run{index}" for index in range(3)])
    found = {entry.name: len(entry.runs) for entry in study.mergers}
    assert found == {"ties (density=0.1)": 1, "ties (density=0.2)": 2}
