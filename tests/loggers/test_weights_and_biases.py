import json
import logging
import os
import shlex
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from made_up import answer, make_results
from wandb_reader import find_runs

from clmerge.loggers import (
    build_wandb_logger,
    finish_loggers,
    log_artifacts,
    log_comparison,
    log_summary,
    log_task,
    task_metrics,
    wandb_sync_command,
    weights_and_biases,
)
from clmerge.results.run_folder import RunFolder
from clmerge.weights import TaskVectorBank, save_tensors


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
    results = answer(make_results(2))
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
    assert [step for step, _ in run.rows("cl_accuracy_magmax/task 1", axis="trainer/global_step")] == [10, 20]
    for name, value in task_metrics(results).items():
        assert run.step_metric(name.replace(".", "\\.")) == "cl/task", name
        assert run.rows(name)[-1] == (2, pytest.approx(value, rel=1e-12)), name
        assert run.summary[name] == pytest.approx(value, rel=1e-12), name
    averages = results.figures("ties_density0.1")["average_accuracy"]
    assert run.rows("cl_average_accuracy/ties_density0.1") == [
        (1, pytest.approx(averages[0])),
        (2, pytest.approx(averages[1])),
    ]
    assert run.summary["cl/best_merger"] == "magmax"

    for model in ("magmax", "ties_density0.1", "expert"):
        pictures = run.rows(f"cl_matrix/{model}/path")
        assert [task for task, _ in pictures] == [1, 2]
        assert all((run.folder / "files" / path).stat().st_size > 5000 for _, path in pictures)
    tables = run.rows("cl_matrix_table/magmax/path")
    assert [task for task, _ in tables] == [1, 2]
    assert [nrows for _, nrows in run.rows("cl_matrix_table/magmax/nrows")] == [2, 4]
    assert len(run.rows("cl_task_aware_matrix_table/zero_shot/path")) == 2
    assert len(run.rows("cl/forgetting_curves/path")) == 1
    assert [task for task, _ in run.rows("cl_confusion/ties_density0.1/path")] == [2]

    def table(name):
        ((_, path),) = run.rows(f"{name}/path")
        return json.loads((run.folder / "files" / path).read_text())

    names, answers = results.class_names, results.confusion("magmax", "task_aware")
    accuracies = table("cl_task_aware_class_accuracy_table/magmax")
    assert accuracies["columns"] == ["class", "images", "accuracy"]
    assert accuracies["data"] == [list(row) for row in zip(names, answers.images, answers.accuracies, strict=True)]
    found = table("cl_task_aware_confusion_table/magmax")
    assert found["columns"] == ["class", "taken_for", "images"]
    assert {(a, b): n for a, b, n in found["data"]} == {
        **{(name, name): count for name, count in zip(names, answers.right, strict=True)},
        **{(names[i], None if j is None else names[j]): count for i, j, count in answers.wrong},
    }
    assert not [name for row in run.history for name in row if "confusion_table/zero_shot" in name], "none was counted"
    (path,) = [value for row in run.history for key, value in row.items() if key == "cl/confusion_matrix_table/path"]
    matrix = json.loads((run.folder / "files" / path).read_text())
    assert matrix["columns"] == ["Actual", "Predicted", "nPredictions"]
    counts = results.confusion("magmax").matrix()
    assert matrix["data"] == [[names[i], names[j], int(counts[i, j])] for i in range(4) for j in range(4)]

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
    assert first.rows("cl_average_accuracy/magmax")[0][0] == 1
    assert second.rows("cl_average_accuracy/magmax")[0][0] == 2
    assert shlex.split(wandb_sync_command(wandb_home))[2:] == [str(first.folder), str(second.folder)]


def test_an_agent_of_a_sweep_chooses_the_run(wandb_home, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    logger = build_wandb_logger(wandb_home / "run", name="our name")
    finish_loggers([logger])
    (run,) = find_runs(wandb_home / "run")
    assert (run.run.run_id, run.run.sweep_id, run.run.display_name) == ("chosen", "sweep1", "our name")


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
    from clmerge.loggers import weights_and_biases as loggers

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
    from clmerge.loggers import weights_and_biases as loggers

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
    from clmerge.loggers import weights_and_biases as loggers

    monkeypatch.setattr(loggers, "_INIT_SECONDS", 1.0)
    log_in(monkeypatch, silent_server)
    start = time.monotonic()
    logger = build_wandb_logger(wandb_home / "run", run_id="abc")
    assert time.monotonic() - start < 30
    log_task([logger], make_results(2), 1, images=False)
    finish_loggers([logger])
    (run,) = find_runs(wandb_home / "run")
    assert len(run.rows("cl_forgetting/magmax")) == 1
    assert "did not answer" in caplog.text


def test_nothing_to_sync(tmp_path):
    assert wandb_sync_command(tmp_path) is None


@pytest.fixture
def finished_run(wandb_home):
    """A run folder with a bank and final models, and the results that go with it."""
    folder = RunFolder.create(wandb_home / "runs" / "mine")
    bank = TaskVectorBank(folder.bank)
    results = make_results(2)
    for task in range(2):
        bank.append(task, {"w": torch.full((3,), float(task))}, name=f"task {task + 1}", base="ab" * 32)
    for name in results.mergers:
        save_tensors(folder.model(name), {"w": torch.ones(3)}, {"merger": name.upper()})
    return folder, results


def test_artifacts_wait_offline_with_their_lineage(finished_run):
    folder, results = finished_run
    logger = build_wandb_logger(folder.logs, run_id="run1", config={"backbone": "nano"})
    log_artifacts([logger], folder, results)
    finish_loggers([logger])
    (run,) = find_runs(folder.logs)
    found = {artifact.name: artifact for artifact in run.artifacts}
    assert {name: artifact.type for name, artifact in found.items()} == {
        "base-abababababab": "base",
        "run1-task-001": "task-vector",
        "run1-task-002": "task-vector",
        "run1-magmax": "merged-model",
        "run1-ties_density0.1": "merged-model",
    }
    # Base and task vectors are inputs: base -> experts -> merged.
    inputs = {name for name, artifact in found.items() if artifact.use_after_commit}
    assert inputs == {"base-abababababab", "run1-task-001", "run1-task-002"}
    metadata = {name: json.loads(artifact.metadata) for name, artifact in found.items()}
    assert metadata["run1-task-002"]["base"] == "base-abababababab"
    assert metadata["run1-task-002"]["name"] == "task 2"
    merged = metadata["run1-ties_density0.1"]
    assert merged["task_vectors"] == ["run1-task-001", "run1-task-002"]
    assert merged["base"] == "base-abababababab"
    assert merged["merger"] == "TIES_DENSITY0.1"
    assert merged["average_accuracy"] == results.figures("ties_density0.1")["average_accuracy"][-1]
    about = json.loads((folder.logs / "base.json").read_text())
    assert about == {"fingerprint": "ab" * 32, "backbone": "nano"}
    # The files themselves are meant, not copies.
    contents = {entry.path: entry.local_path for entry in found["run1-task-001"].manifest.contents}
    assert contents == {"task_000.safetensors": str(folder.bank / "task_000.safetensors")}


def test_online_the_public_method_declares_inputs_and_a_base_is_one_artifact_for_all_runs(finished_run):
    folder, results = finished_run
    bases = []
    for run_id in ("run1", "run2"):
        used, logged = [], []
        run = SimpleNamespace(
            id=run_id,
            offline=False,
            config={"backbone": "nano"},
            use_artifact=used.append,
            log_artifact=logged.append,
        )
        weights_and_biases.log_artifacts(run, folder, results)
        assert [one.name for one in used[1:]] == [f"{run_id}-task-001", f"{run_id}-task-002"]
        assert [one.name for one in logged] == [f"{run_id}-magmax", f"{run_id}-ties_density0.1"]
        bases.append((used[0].name, used[0].digest))
    assert bases[0] == bases[1]


def test_artifacts_need_task_vectors(wandb_home):
    folder = RunFolder.create(wandb_home / "runs" / "empty")
    with pytest.raises(ValueError, match=r"learner\.keep_task_vectors=true"):
        weights_and_biases.log_artifacts(SimpleNamespace(), folder, make_results(2))


def test_a_comparison_is_told_like_a_run(wandb_home):
    results = make_results(2)
    search = {
        "model": "ties_density0.1",
        "parameters": {"scale": [0.5, 1.0]},
        "points": [{"values": {"scale": 0.5}, "score": 0.4}, {"values": {"scale": 1.0}, "score": 0.6}],
        "chosen": {"scale": 1.0},
    }
    logger = build_wandb_logger(wandb_home / "compared", run_id="c1", job_type="compare")
    results.searches = [search]
    log_comparison([logger], results)
    finish_loggers([logger])
    (run,) = find_runs(wandb_home / "compared")
    assert run.run.job_type == "compare"
    averages = results.figures("ties_density0.1")["average_accuracy"]
    assert run.rows("cl_average_accuracy/ties_density0.1") == [
        (1, pytest.approx(averages[0])),
        (2, pytest.approx(averages[1])),
    ]
    assert [task for task, _ in run.rows("cl_matrix/magmax/path")] == [2]
    (table,) = [row["cl_search/ties_density0.1/path"] for row in run.history if "cl_search/ties_density0.1/path" in row]
    content = json.loads((run.folder / "files" / table).read_text())
    assert (content["columns"], content["data"]) == (["scale", "validation_score"], [[0.5, 0.4], [1.0, 0.6]])
    assert run.summary["cl_search/ties_density0.1/scale"] == 1.0
    assert run.summary["cl/average_accuracy"] == pytest.approx(results.figures("magmax")["average_accuracy"][-1])
    # One chart has a line for every model.
    (path,) = [row[key] for row in run.history for key in row if key == "cl/average_accuracy_chart_table/path"]
    rows = json.loads((run.folder / "files" / path).read_text())["data"]
    lines = {name: [value for _, key, value in rows if key == name] for name in results.models}
    assert lines == {name: pytest.approx(results.figures(name)["average_accuracy"]) for name in results.models}
