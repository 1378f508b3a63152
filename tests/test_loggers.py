import csv
import logging
import math
import os
import shlex
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from made_up import make_results
from wandb_reader import find_runs

from clmerge.loggers import (
    build_wandb_logger,
    finish_loggers,
    log_summary,
    log_task,
    task_metrics,
    wandb_sync_command,
)

FIGURES = {
    "average_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "average_incremental_accuracy",
    "learning_accuracy",
}


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


@pytest.fixture
def wandb_home(tmp_path, monkeypatch):
    """Keep W&B's files and credentials of this machine out of the test."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "home" / name))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    yield tmp_path
    wandb.teardown()


def expected_names(results):
    return {
        f"{prefix}/{model}/{name}"
        for prefix in ("cl", "cl_task_aware")
        for model in results.models
        for name in FIGURES | {f"accuracy/{task}" for task in results.tasks}
    }


def test_metric_names_are_exact_and_undefined_ones_left_out():
    results = make_results(2, names="digits {0}, {0}.5")
    metrics = task_metrics(results)
    assert metrics.keys() == expected_names(results)
    assert metrics["cl/magmax/accuracy/digits 2, 2.5"] == results.matrix("magmax")[-1, 1]
    assert metrics["cl_task_aware/expert/forgetting"] == results.figures("expert", "task_aware")["forgetting"]
    first = task_metrics(make_results(2, finished=1, growing=True))
    assert "cl/magmax/forgetting" not in first
    assert "cl/magmax/accuracy/task 2" not in first
    assert not any(math.isnan(value) for value in first.values())


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
    assert "cl/ties_density0\\.1/forgetting" in run.defined


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
    assert tasks[0]["cl/expert/forgetting"] == ""
    assert float(tasks[1]["cl/expert/forgetting"]) == results.figures("expert")["forgetting"]
    assert float(tasks[1]["cl/expert/accuracy/task 1"]) == results.matrix("expert")[1, 0]


def test_tensorboard_draws_figures_against_tasks(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name=None, version="tb")
    for finished in (1, 2):
        log_task([logger], make_results(2, finished=finished), finished - 1)
    finish_loggers([logger])
    events = accumulator.EventAccumulator(str(tmp_path / "tb")).Reload()
    results = make_results(2)
    assert expected_names(results) <= set(events.Tags()["scalars"])
    scalars = events.Scalars("cl/magmax/average_accuracy")
    assert [event.step for event in scalars] == [1, 2]
    assert [event.value for event in scalars] == pytest.approx(results.figures("magmax")["average_accuracy"])


def test_an_offline_run_holds_everything(wandb_home):
    logger = build_wandb_logger(
        wandb_home / "run",
        project="streams",
        name="magmax on digits",
        group="digits",
        tags=["quickstart"],
        run_id="abc123",
        config={"trainer": {"max_epochs": 3}},
    )
    assert "WANDB_MODE" not in os.environ
    for finished in (1, 2):
        logger.log_metrics({"train/loss": 1.0 / finished}, step=10 * finished)
        log_task([logger], make_results(2, finished=finished), finished - 1)
    results = make_results(2)
    log_summary([logger], results)
    finish_loggers([logger])

    (run,) = find_runs(wandb_home / "run")
    assert run.finished
    assert (run.run.run_id, run.run.project, run.run.display_name) == (
        "abc123",
        "streams",
        "magmax on digits",
    )
    assert (run.run.run_group, list(run.run.tags)) == ("digits", ["quickstart"])
    assert run.config["trainer"] == {"max_epochs": 3}

    assert run.step_metric("*") == "trainer/global_step"
    assert run.rows("train/loss", axis="trainer/global_step") == [(10, 1.0), (20, 0.5)]
    # W&B adds where training stood to rows that do not say it.
    assert [step for step, _ in run.rows("cl/magmax/accuracy/task 1", axis="trainer/global_step")] == [10, 20]
    for name, value in task_metrics(results).items():
        assert run.step_metric(name.replace(".", "\\.")) == "cl/task", name
        assert run.rows(name)[-1] == (2, pytest.approx(value, rel=1e-12)), name
        assert run.summary[name] == pytest.approx(value, rel=1e-12), name
    averages = results.figures("ties_density0.1")["average_accuracy"]
    assert run.rows("cl/ties_density0.1/average_accuracy") == [
        (1, pytest.approx(averages[0])),
        (2, pytest.approx(averages[1])),
    ]
    assert run.summary["cl/best_merger"] == "magmax"

    for model in ("magmax", "ties_density0.1", "expert"):
        pictures = run.rows(f"cl/{model}/R/path")
        assert [task for task, _ in pictures] == [1, 2]
        assert all((run.folder / "files" / path).stat().st_size > 5000 for _, path in pictures)
    tables = run.rows("cl/magmax/R_table/path")
    assert [task for task, _ in tables] == [1, 2]
    assert [nrows for _, nrows in run.rows("cl/magmax/R_table/nrows")] == [2, 4]
    assert len(run.rows("cl_task_aware/zero_shot/R_table/path")) == 2
    assert len(run.rows("cl/forgetting_curves/path")) == 1

    command = wandb_sync_command(wandb_home / "run")
    assert shlex.split(command) == ["wandb", "sync", str(run.folder)]


def test_a_resumed_run_keeps_its_identity(wandb_home):
    for finished in (1, 2):
        logger = build_wandb_logger(wandb_home, run_id="same")
        log_task([logger], make_results(2, finished=finished), finished - 1, images=False)
        finish_loggers([logger], success=finished == 2)
        time.sleep(1.1)  # W&B names the folders of offline runs by the second
    first, second = find_runs(wandb_home)
    assert first.run.run_id == second.run.run_id == "same"
    assert first.rows("cl/magmax/average_accuracy")[0][0] == 1
    assert second.rows("cl/magmax/average_accuracy")[0][0] == 2
    assert shlex.split(wandb_sync_command(wandb_home))[2:] == [str(first.folder), str(second.folder)]


def test_a_run_the_caller_has_in_progress_is_left_alone(wandb_home):
    import wandb

    own = wandb.init(mode="offline", dir=wandb_home, project="own", id="own")
    logger = build_wandb_logger(wandb_home / "run", run_id="ours")
    assert logger.experiment.id == "ours"
    assert wandb.run is own
    finish_loggers([logger])
    own.finish()


def test_other_ranks_start_no_run(wandb_home, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = build_wandb_logger(wandb_home / "run", run_id="abc")
    log_task([logger], make_results(2), 1)
    finish_loggers([logger])
    assert not (wandb_home / "run").exists()


@pytest.fixture
def silent_server():
    """A server that accepts connections and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    connections = []
    stop = threading.Event()

    def accept():
        server.settimeout(0.1)
        while not stop.is_set():
            try:
                connections.append(server.accept()[0])
            except TimeoutError:
                continue

    thread = threading.Thread(target=accept)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    stop.set()
    thread.join()
    for connection in connections:
        connection.close()
    server.close()


def log_in(monkeypatch, url):
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)


def unused_url():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def choose(caplog, online=False):
    from clmerge import loggers

    caplog.set_level(logging.INFO, logger="clmerge.loggers")
    return loggers._choose_mode(online), caplog.records[-1]


def test_mode_offline_unless_logged_in_or_asked(wandb_home, caplog):
    mode, record = choose(caplog)
    assert mode == "offline"
    assert "you are not logged in" in record.getMessage()
    assert record.levelno == logging.INFO


@pytest.mark.parametrize("asked", ["argument", "environment", "key", "netrc"])
def test_mode_offline_if_the_server_is_unreachable(wandb_home, monkeypatch, caplog, asked):
    url = unused_url()
    monkeypatch.setenv("WANDB_BASE_URL", url)
    if asked == "environment":
        monkeypatch.setenv("WANDB_MODE", "online")
    elif asked == "key":
        log_in(monkeypatch, url)
    elif asked == "netrc":
        (wandb_home / "netrc").write_text(f"machine {url.removeprefix('http://')} login user password {'0' * 40}\n")
    start = time.monotonic()
    mode, record = choose(caplog, online=asked == "argument")
    assert time.monotonic() - start < 5
    assert mode == "offline"
    assert f"{url} did not accept a connection" in record.getMessage()
    # Who asked for online must not overlook that the run is offline.
    assert (record.levelno == logging.WARNING) == (asked in ("argument", "environment"))


@pytest.mark.parametrize("asked", ["argument", "key", "netrc"])
def test_mode_online_if_reachable(wandb_home, monkeypatch, caplog, silent_server, asked):
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    if asked == "key":
        log_in(monkeypatch, silent_server)
    elif asked == "netrc":
        (wandb_home / "netrc").write_text(f"machine api.wandb.ai login user password {'0' * 40}\n")
    mode, record = choose(caplog, online=asked == "argument")
    assert mode == "online"
    assert ("you asked for it" if asked == "argument" else "you are logged in") in record.getMessage()


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_mode_of_the_environment_wins(wandb_home, monkeypatch, caplog, silent_server, mode):
    log_in(monkeypatch, silent_server)
    monkeypatch.setenv("WANDB_MODE", mode)
    assert choose(caplog, online=True)[0] == mode


def test_a_damaged_netrc_is_reported(wandb_home, caplog):
    (wandb_home / "netrc").write_text("machine\n")
    caplog.set_level(logging.WARNING, logger="clmerge.loggers")
    assert choose(caplog)[0] == "offline"
    assert any("cannot read" in record.getMessage() for record in caplog.records)


def test_the_proxy_is_what_must_be_reachable(wandb_home, monkeypatch, caplog, silent_server):
    log_in(monkeypatch, "http://wandb.invalid")
    monkeypatch.setenv("http_proxy", silent_server)
    assert choose(caplog)[0] == "online"


def test_a_name_that_takes_long_to_look_up_does_not_hang(wandb_home, monkeypatch, caplog):
    from clmerge import loggers

    released = threading.Event()
    monkeypatch.setattr(loggers, "_CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(
        loggers, "socket", SimpleNamespace(create_connection=lambda *_: SimpleNamespace(close=released.wait))
    )
    log_in(monkeypatch, "http://wandb.invalid")
    start = time.monotonic()
    assert choose(caplog)[0] == "offline"
    assert time.monotonic() - start < 5
    released.set()


def test_a_server_that_never_answers_ends_in_an_offline_run(wandb_home, monkeypatch, caplog, silent_server):
    from clmerge import loggers

    monkeypatch.setattr(loggers, "_INIT_SECONDS", 1.0)
    log_in(monkeypatch, silent_server)
    start = time.monotonic()
    logger = build_wandb_logger(wandb_home / "run", run_id="abc")
    assert time.monotonic() - start < 30
    log_task([logger], make_results(2), 1, images=False)
    finish_loggers([logger])
    (run,) = find_runs(wandb_home / "run")
    assert len(run.rows("cl/magmax/forgetting")) == 1
    assert "did not answer" in caplog.text


def test_nothing_to_sync(tmp_path):
    assert wandb_sync_command(tmp_path) is None
