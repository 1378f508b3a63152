import csv
import re
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from made_up import answer, make_results

from clmerge.loggers import describe_run, finish_loggers, log_facts, log_summary, log_task, task_metrics
from clmerge.loggers.metrics import by_task_metrics


class FakeRun:
    """Records what a W&B run is told."""

    def __init__(self):
        self.defined, self.logged, self.summary, self.exit_codes = {}, [], {}, []

    def define_metric(self, name, **settings):
        self.defined[name] = settings

    def log(self, data, **settings):
        assert not settings, "W&B drops rows whose step lies behind"
        self.logged.append(data)

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)


def test_wandb_is_told_exact_names_on_the_tasks_axis():
    run = FakeRun()
    results = make_results(2)
    log_task([WandbLogger(experiment=run)], results, 1, images=False)
    (row,) = run.logged
    assert row == {"cl/task": 2, **task_metrics(results)}
    assert run.defined.pop("cl/task") == {}
    assert {name.replace("\\.", ".") for name in run.defined} == row.keys() - {"cl/task"}
    assert all(settings == {"step_metric": "cl/task"} for settings in run.defined.values())
    # An unescaped dot would mean a nested value.
    assert "cl_forgetting/ties_density0\\.1" in run.defined


def test_an_earlier_task_can_be_told_again():
    now, later = FakeRun(), FakeRun()
    log_task([WandbLogger(experiment=now)], make_results(3, finished=2), 1, images=False)
    log_task([WandbLogger(experiment=later)], make_results(3), 1, images=False)
    assert later.logged == now.logged


@pytest.mark.parametrize("task", [-1, 2])
def test_the_task_must_be_finished(task):
    with pytest.raises(ValueError, match=f"one of 2 finished tasks, got task {task}"):
        log_task([], make_results(3, finished=2), task)


def test_csv_logger_keeps_training_rows_and_takes_new_columns(tmp_path):
    logger = CSVLogger(tmp_path, name=None, version="csv")
    for finished in (1, 2):
        logger.log_metrics({"train_loss": 1.0 / finished}, step=50 * finished)
        log_task([logger], make_results(2, finished=finished, growing=True), finished - 1)
    finish_loggers([logger])
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["train_loss"] for row in rows] == ["1.0", "", "0.5", ""]
    tasks = [row for row in rows if row["cl/task"]]
    assert [float(row["cl/task"]) for row in tasks] == [1, 2]
    results = make_results(2, growing=True)
    assert tasks[0]["cl_forgetting/expert"] == ""
    assert float(tasks[1]["cl_forgetting/expert"]) == results.figures("expert")["forgetting"]
    assert not any("task 1" in name for name in rows[0]), "no column for every task"


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_csv_has_a_line_for_every_number_of_a_task(tmp_path):
    for _ in range(2):  # a second logger of the same folder begins the file anew, as Lightning's does
        logger = CSVLogger(tmp_path, name=None, version="csv")
        for finished in (1, 2):
            log_task([logger], make_results(2, finished=finished, growing=True), finished - 1)
        finish_loggers([logger])
    with (tmp_path / "csv" / "tasks.csv").open(newline="") as file:
        rows = [(int(row["cl/task"]), row["metric"], float(row["value"])) for row in csv.DictReader(file)]
    expected = [by_task_metrics(make_results(2, finished=finished, growing=True)) for finished in (1, 2)]
    assert rows == [(task, *item) for task, found in enumerate(expected, start=1) for item in found.items()]
    results = make_results(2, growing=True)
    assert (2, "cl_accuracy_expert/task 1", results.matrix("expert")[1, 0]) in rows


def test_tensorboard_draws_figures_against_tasks(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name=None, version="tb")
    for finished in (1, 2):
        log_task([logger], make_results(2, finished=finished), finished - 1)
    finish_loggers([logger])
    events = accumulator.EventAccumulator(str(tmp_path / "tb")).Reload()
    results = make_results(2)
    assert task_metrics(results).keys() <= set(events.Tags()["scalars"])
    scalars = events.Scalars("cl_average_accuracy/magmax")
    assert [event.step for event in scalars] == [1, 2]
    assert [event.value for event in scalars] == pytest.approx(results.figures("magmax")["average_accuracy"])
    images = set(events.Tags()["images"])
    assert {"cl_matrix/magmax", "cl_matrix/expert"} <= images
    assert [event.step for event in events.Images("cl_matrix/magmax")] == [1, 2]
    log_summary([logger], answer(results))
    finish_loggers([logger])
    assert {"cl_confusion/magmax", "cl_confusion/expert"} <= set(events.Reload().Tags()["images"])
    assert "cl/forgetting_curves" in events.Reload().Tags()["images"]


def test_mlflow_gets_metrics_against_tasks_parameters_and_pictures(monkeypatch):
    told, shown = [], []
    logger = object.__new__(MLFlowLogger)
    client = SimpleNamespace(log_figure=lambda run, figure, path: shown.append((run, path)))
    monkeypatch.setattr(MLFlowLogger, "experiment", client)
    monkeypatch.setattr(MLFlowLogger, "run_id", "r1")
    monkeypatch.setattr(MLFlowLogger, "log_metrics", lambda self, metrics, step: told.append((step, metrics)))
    monkeypatch.setattr(MLFlowLogger, "log_hyperparams", lambda self, params: told.append(params))
    results = make_results(2)
    log_facts([logger], describe_run({"seed": 3}, stream="digits", num_tasks=2, mergers=["magmax"]))
    log_task([logger], results, 1)
    assert (told[0]["stream"], told[0]["seed"]) == ("digits", 3)
    assert told[1] == (2, {"cl/task": 2.0, **task_metrics(results)})
    assert ("r1", "cl_matrix/magmax_002.png") in shown


def test_mlflow_gets_names_that_it_accepts_and_not_too_many_at_once(monkeypatch):
    told = []
    logger = object.__new__(MLFlowLogger)
    monkeypatch.setattr(MLFlowLogger, "log_metrics", lambda self, metrics, step: told.append((step, metrics)))
    monkeypatch.setattr(MLFlowLogger, "save", lambda self: None)
    results = make_results(80, ("magmax", "magmax+tuned", "magmax_tuned", "a", "b", "c", "d"), names="\u4e2d {}")
    log_task([logger], results, 79, images=False)
    assert {step for step, _ in told} == {80}
    assert all(len(metrics) <= 1000 for _, metrics in told)
    assert len(told) == 2
    found = [(name, value) for _, metrics in told for name, value in metrics.items()]
    assert [value for _, value in found] == [80.0, *task_metrics(results).values()]
    assert len({name for name, _ in found}) == len(found)
    assert all(re.fullmatch(r"[a-zA-Z0-9_/. -]+", name) for name, _ in found)
    assert {"cl_forgetting/magmax_tuned", "cl_forgetting/magmax_tuned-2"} <= {name for name, _ in found}


def test_the_configuration_goes_to_every_logger_but_wandbs(tmp_path):
    facts = describe_run({"seed": 3, "a": {"b": 1}}, stream="digits", num_tasks=2, mergers=["magmax"])
    logger = CSVLogger(tmp_path, name=None, version="csv")
    log_facts([logger, WandbLogger(experiment=FakeRun())], facts)
    logger.save()
    text = (tmp_path / "csv" / "hparams.yaml").read_text()
    assert "a/b: 1" in text
    assert "method: magmax" in text


def test_the_deployed_merger_makes_the_headline():
    run = FakeRun()
    results = make_results(2)
    log_task([WandbLogger(experiment=run)], results, 1, deployed="ties_density0.1", images=False)
    assert run.logged[0]["cl/average_accuracy"] == results.figures("ties_density0.1")["average_accuracy"][-1]


def test_pictures_are_not_drawn_for_loggers_that_show_none(tmp_path, monkeypatch):
    drawn = []
    for name in ("plot_matrix", "plot_average_accuracy", "plot_forgetting_curves", "plot_final_accuracy"):
        monkeypatch.setattr(f"clmerge.figures.{name}", lambda *_: drawn.append(1))
    logger = CSVLogger(tmp_path, name=None, version="csv")
    log_task([logger], make_results(2), 1)
    log_summary([logger], make_results(2))
    assert drawn == []
