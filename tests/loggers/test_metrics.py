import math

import pytest
from made_up import make_results

from clmerge.loggers import FIGURES, task_metrics


def expected_names(results):
    names = set()
    for prefix in ("cl", "cl_task_aware"):
        names |= {f"{prefix}/{figure}" for figure in FIGURES}
        names |= {f"{prefix}_{figure}/{model}" for figure in FIGURES for model in results.models}
        names |= {f"{prefix}_accuracy_{model}/{task}" for model in results.models for task in results.tasks}
    return names


def test_every_figure_of_every_model_has_its_name():
    results = make_results(2, names="digits {0}, {0}.5")
    metrics = task_metrics(results)
    assert metrics.keys() == expected_names(results)
    assert metrics["cl_accuracy_magmax/digits 2, 2.5"] == results.matrix("magmax")[-1, 1]
    assert metrics["cl_task_aware_forgetting/expert"] == results.figures("expert", "task_aware")["forgetting"]
    assert metrics["cl_average_accuracy/expert"] == results.figures("expert")["average_accuracy"][-1]


def test_names_have_one_slash_so_that_sections_do_not_depend_on_how_a_dashboard_groups():
    sections = {name.split("/")[0] for name in task_metrics(make_results(3))}
    assert all(name.count("/") == 1 for name in task_metrics(make_results(3)))
    assert {"cl", "cl_average_accuracy", "cl_forgetting", "cl_accuracy_magmax", "cl_task_aware"} <= sections


def test_undefined_figures_are_left_out():
    first = task_metrics(make_results(2, finished=1, growing=True))
    assert "cl_forgetting/magmax" not in first
    assert "cl_accuracy_magmax/task 2" not in first
    assert not any(math.isnan(value) for value in first.values())


@pytest.mark.parametrize("deployed", [None, "ties_density0.1", "expert"])
def test_one_model_stands_for_the_run(deployed):
    results = make_results(3)
    metrics = task_metrics(results, deployed)
    for figure in FIGURES:
        assert metrics[f"cl/{figure}"] == metrics[f"cl_{figure}/{deployed or 'magmax'}"]
    with pytest.raises(ValueError, match=r"one of the models .* got 'other'"):
        task_metrics(results, "other")


def test_the_unmerged_model_stands_for_a_run_without_mergers():
    metrics = task_metrics(make_results(2, models=("expert",)))
    assert metrics["cl/average_accuracy"] == metrics["cl_average_accuracy/expert"]
