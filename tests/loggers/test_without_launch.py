import subprocess
import sys

from clmerge.loggers.without_launch import without_launch

NAME = "wandb.sdk.launch.inputs.internal"
START = """
import sys
from clmerge.loggers import build_wandb_logger
logger = build_wandb_logger(sys.argv[1], project="p", config={"a": 1})
assert logger.experiment.config["a"] == 1
logger.experiment.finish()
assert not any(name.startswith(("wandb.apis.public", "wandb.sdk.launch")) for name in sys.modules)
"""


def test_a_run_starts_without_the_import_of_launch(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # of a run in another test's process
    found = subprocess.run([sys.executable, "-c", START, str(tmp_path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert list(tmp_path.rglob("*.wandb"))


def test_nothing_is_left_behind(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("wandb.sdk.launch")]:
        monkeypatch.delitem(sys.modules, name)
    with without_launch():
        sys.modules[NAME].StagedLaunchInputs().apply(None)
    assert NAME not in sys.modules


def test_a_program_that_uses_launch_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb.sdk.launch", sys)
    monkeypatch.setitem(sys.modules, NAME, sys)
    with without_launch():
        assert sys.modules[NAME] is sys
    assert sys.modules[NAME] is sys
