"""A run logged to a real MLflow server, read back through its REST interface; runs where MLflow is installed."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest

from clmerge.cli import main
from clmerge.loggers import task_metrics
from clmerge.loggers.telling import mlflow_names
from clmerge.results.results import Results

pytestmark = [pytest.mark.peers, pytest.mark.slow]
pytest.importorskip("mlflow")

CONFIG = """
name: told
seed: 3
stream: {class_path: ClassIncremental, init_args: {num_tasks: 2, val_fraction: 0.2,
  source: {class_path: SklearnDigits, init_args: {test_fraction: 0.1}}}}
model: {backbone: OpenClip, loss_classes: all}
mergers: [MagMax, TIES]
learner: {calibrations: [SampleTuning]}
data: {batch_size: 64}
trainer: {max_epochs: 1, accelerator: cpu, limit_train_batches: 3, limit_val_batches: 1, enable_progress_bar: false}
logging: {wandb: false, csv: false}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server with a data base and a folder of artifacts."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/runs.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    log = (folder / "log").open("wb")
    process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env={**os.environ, "HOME": str(folder)})
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                urlopen(f"{address}/health", timeout=2).close()
                break
            except (URLError, OSError):
                time.sleep(0.2)
        else:
            pytest.fail((folder / "log").read_text())
        yield address
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def ask(address, what, body=None, **query):
    """Return the answer of MLflow's REST interface."""
    url = f"{address}/api/2.0/mlflow/{what}" + (f"?{urlencode(query)}" if query else "")
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=30) as answer:
        return json.loads(answer.read())


def test_a_run_is_read_back_from_a_server(server, tmp_path, monkeypatch, recwarn):
    (tmp_path / "config.yaml").write_text(CONFIG)
    settings = json.dumps({"tracking_uri": server, "experiment_name": "clmerge"})
    extra = f'--logging.extra=[{{"class_path": "MLFlowLogger", "init_args": {settings}}}]'
    run = tmp_path / "run"
    assert main(["fit", "--config", str(tmp_path / "config.yaml"), "--run_dir", str(run), extra]) == 0
    monkeypatch.delenv("CLMERGE_RUN_DIR")
    assert not [str(warning.message) for warning in recwarn if "MLFlow" in str(warning.message)]
    results = Results.from_dict(json.loads((run / "results.json").read_text())["runs"][0])

    experiment = ask(server, "experiments/get-by-name", experiment_name="clmerge")["experiment"]["experiment_id"]
    (found,) = ask(server, "runs/search", {"experiment_ids": [experiment]})["runs"]
    assert found["info"]["status"] == "FINISHED"
    params = {each["key"]: each["value"] for each in found["data"]["params"]}
    assert (params["stream"], params["method"], params["seed"]) == ("SklearnDigits-2", "magmax+ties", "3")
    assert params["stream/source/test_fraction"] == "0.1"

    last = {each["key"]: each["value"] for each in found["data"]["metrics"]}
    expected = {"cl/task": 2.0, **task_metrics(results)}
    for name, value in zip(mlflow_names(list(expected)), expected.values(), strict=True):
        assert last[name] == pytest.approx(value, rel=1e-12), name
    assert "cl_average_accuracy/magmax_tuned" in last, "without the plus, which MLflow refuses"
    assert {"train/loss", "val/loss"} <= last.keys()
    identity = found["info"]["run_id"]
    history = ask(server, "metrics/get-history", run_id=identity, metric_key="cl_average_accuracy/magmax")["metrics"]
    averages = results.figures("magmax")["average_accuracy"]
    assert [(each["step"], each["value"]) for each in history] == [(1, averages[0]), (2, averages[1])]

    pictures = ask(server, "artifacts/list", run_id=identity, path="cl_matrix")["files"]
    sizes = {each["path"]: int(each["file_size"]) for each in pictures}
    assert {"cl_matrix/magmax_001.png", "cl_matrix/magmax_002.png", "cl_matrix/magmax+tuned_002.png"} <= sizes.keys()
    assert min(sizes.values()) > 5000
    confusion = {each["path"] for each in ask(server, "artifacts/list", run_id=identity, path="cl_confusion")["files"]}
    assert "cl_confusion/magmax_002.png" in confusion
    assert all(re.fullmatch(r"cl_\w+/.+_\d{3}\.png", path) for path in sizes)
