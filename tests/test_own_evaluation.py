"""The reading of the logits that a stream goes by decides everywhere: tables, the star, pictures, loggers, searches."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.comparisons import write_comparison
from support.records import record, without_times
from support.tiny import tiny_clip
from torch import nn

from clmerge import figures
from clmerge.cli import main
from clmerge.evaluation.evaluate import accuracy_on
from clmerge.loggers import metrics, telling
from clmerge.merging import TaskArithmetic
from clmerge.merging.strategies.goal import Goal
from clmerge.report import read_study
from clmerge.report.page import make_views
from clmerge.results.results import Results
from clmerge.results.table import render_text
from clmerge.runs.comparison import searches
from clmerge.runs.comparison.searches import search_all
from clmerge.search.search import Search
from clmerge.streams import ClassIncremental, DomainIncremental, TaskIncremental


def two_readings(evaluation="task_aware"):
    """``first`` is better where all classes compete, ``second`` where only those of the task do."""
    results = Results(["a", "b"], classes=[["0", "1"], ["2", "3"]], evaluation=evaluation)
    for _ in range(2):
        results.add_row("first", [0.5, 0.4], [0.6, 0.6])
        results.add_row("second", [0.3, 0.2], [0.9, 0.8])
    return results


def test_streams_say_which_evaluation_is_their_own():
    assert TaskIncremental.evaluation == "task_aware"
    assert ClassIncremental.evaluation == DomainIncremental.evaluation == "task_agnostic"


@pytest.mark.parametrize(("evaluation", "best"), [("task_agnostic", "first"), ("task_aware", "second")])
def test_results_carry_it_and_name_the_best_by_it(evaluation, best):
    results = two_readings(evaluation)
    assert results.best_merger() == best
    again = Results.from_dict(json.loads(json.dumps(results.to_dict())))
    assert again.evaluation == results.until(1).evaluation == evaluation
    text = render_text(results)
    assert f"after task 2 of 2, {evaluation.replace('_', '-')}\n" in text
    assert f"\n{best} *" in text


def test_results_of_before_are_task_agnostic_and_others_are_refused():
    document = two_readings().to_dict()
    del document["evaluation"]
    assert Results.from_dict(document).evaluation == "task_agnostic"
    with pytest.raises(ValueError, match=r"expected evaluation to be .*'oracle'"):
        Results.from_dict({**document, "evaluation": "oracle"})


def test_pictures_of_it_are_in_the_folder_itself(tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(figures, "to_png", lambda figure: figure)
    monkeypatch.setattr(figures, "write_bytes_atomic", shown.__setitem__)
    figures.save_plots(two_readings(), tmp_path)
    assert {file.parent for file in shown} == {tmp_path, tmp_path / "task_agnostic"}
    assert figures.plot_files(two_readings(), tmp_path) == list(shown)
    for folder, expected in ((tmp_path, "task-aware"), (tmp_path / "task_agnostic", "task-agnostic")):
        assert expected in shown[folder / "final_accuracy.png"].axes[0].get_ylabel()
    assert "task-aware" in shown[tmp_path / "matrix_first.png"].axes[-1].get_ylabel()


def test_loggers_are_told_its_figures_as_those_of_the_run():
    found = metrics.task_metrics(two_readings(), "second")
    assert found["cl/average_accuracy"] == pytest.approx(0.85)
    assert found["cl_task_aware/average_accuracy"] == pytest.approx(0.85)
    assert found["cl_average_accuracy/second"] == pytest.approx(0.25)
    assert metrics.task_metrics(two_readings("task_agnostic"), "second")["cl/average_accuracy"] == pytest.approx(0.25)


def test_the_summary_of_wandb_names_it(monkeypatch):
    told = {}
    wandb = SimpleNamespace(
        log_chart=lambda *a: None, log_classes=lambda *a: None, summarise=lambda run, summary: told.update(summary)
    )
    monkeypatch.setattr(telling, "weights_and_biases", wandb)
    monkeypatch.setattr(telling, "WandbLogger", SimpleNamespace)
    monkeypatch.setattr(telling, "_show", lambda *a: None)
    telling.log_summary([SimpleNamespace(experiment=None)], two_readings())
    assert (told["cl/best_merger"], told["cl/evaluation"]) == ("second", "task_aware")


def test_a_comparison_and_its_report_show_it_first(tmp_path):
    write_comparison(tmp_path)
    file = tmp_path / "compare" / "results.json"
    document = json.loads(file.read_text())
    document["runs"][0]["evaluation"] = "task_aware"
    file.write_text(json.dumps(document))
    study = read_study([file.parent])
    assert study.settings == ("task_aware", "task_agnostic")
    assert [view.setting for view in make_views(study)] == ["task_aware", "task_agnostic"]
    assert read_study([file.parent], evaluation="task_agnostic").settings[0] == "task_agnostic"
    mixed = read_study([file.parent, tmp_path / "run0"])
    assert any("go by different accuracies; task_aware is shown first" in note for note in mixed.notes)
    assert replace(mixed, evaluation="task_agnostic").settings[0] == "task_agnostic"


@pytest.mark.parametrize(("evaluation", "chosen"), [("task_agnostic", 0.2), ("task_aware", 0.8)])
def test_a_search_goes_by_it(monkeypatch, evaluation, chosen):
    def sweep(run, mergers, ledger, **options):
        return {
            name: {2: {"task_agnostic": [1 - merger.scale] * 2, "task_aware": [merger.scale] * 2}}
            for name, merger in mergers.items()
        }

    monkeypatch.setattr(searches, "sweep", sweep)
    run = SimpleNamespace(kept=[0, 1], counted=list, name="run", evaluation=evaluation)
    found = Search(
        "task_arithmetic", TaskArithmetic(), {"scale": [0.2, 0.8]}, check=lambda merger: None, goal=Goal([1, 1])
    )
    search_all(run, [found], None, 0)
    assert found.chosen == {"scale": chosen}


def test_a_score_may_leave_out_the_classes_of_other_tasks():
    module = nn.Sequential(nn.Identity())
    module.weight = nn.Parameter(torch.zeros(1))
    logits = torch.tensor([[1.0, 0.0, 5.0, 0.0], [0.0, 3.0, 2.0, 1.0]])
    batches = [(logits, torch.tensor([0, 2]), torch.tensor([0, 1]))]
    assert accuracy_on(module, batches) == 0.0
    assert accuracy_on(module, batches, [[0, 1], [2, 3]]) == 1.0


CONFIG = """
stream:
  class_path: TaskIncremental
  init_args: {{sources: [{{class_path: SklearnDigits}}, {{class_path: SklearnDigits}}]}}
model: {{backbone: {{class_path: OpenClip, init_args: {{name: "{backbone}"}}}}, loss_classes: current}}
mergers: [MagMax, PAINT]
trainer: {{max_epochs: 1, accelerator: cpu, limit_train_batches: 2, limit_val_batches: 1, enable_progress_bar: false}}
logging: {{wandb: false, csv: false}}
"""


def test_fit_and_compare_go_by_what_the_stream_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
    monkeypatch.delenv("CLMERGE_RUN_DIR", raising=False)
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(CONFIG.format(backbone=tiny_clip(tmp_path / "clip")))
    assert main(["fit", "--config", str(config), "--run_dir", str(run)]) == 0
    assert "after task 2 of 2, task-aware\n" in capsys.readouterr().out
    fitted = record(run)
    assert fitted["evaluation"] == "task_aware"
    assert main(["compare", str(run), "--mergers", "PAINT", "MagMax", "--scale", "0.5,1.0"]) == 0
    assert "After task 2 of 2, task-aware\n" in capsys.readouterr().out
    found = record(run / "compare")
    assert found["evaluation"] == "task_aware"
    assert without_times(found)["models"]["paint"] == without_times(fitted)["models"]["paint"]  # scored alike
    assert main(["compare", str(run), "--mergers", "MagMax", "--evaluation", "task_agnostic"]) == 0
    assert "After task 2 of 2, task-agnostic\n" in capsys.readouterr().out
