import os
import subprocess
import sys
from pathlib import Path

import pytest

from clmerge.loggers import build_wandb_logger
from clmerge.loggers.steady import SteadyRun

SCRIPT = """
import os, signal, sys
from pathlib import Path
from clmerge.loggers import build_wandb_logger
logger = build_wandb_logger(sys.argv[1], project="steady")
logger.log_metrics({"a": 1.0}, step=0)
children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
for child in children:
    os.kill(int(child), signal.SIGKILL)
    os.waitpid(int(child), 0)
for step in range(1, 4):
    logger.log_metrics({"a": 2.0}, step=step)
logger.experiment.summary.update({"b": 1})
logger.log_hyperparams({"c": 1})
logger.experiment.finish(exit_code=0)
print("went on")
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the helper process under /proc")
def test_a_killed_helper_of_wandb_is_said_once_and_nothing_else_happens(tmp_path):
    # Without the helper of another test's run in this process, which the script would share rather than start its own.
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=own | {"WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "went on"
    assert found.stderr.count("W&B: its process is gone") == 1
    assert "Traceback" not in found.stderr


def test_a_run_whose_helper_lives_is_the_run_itself():
    class Run:
        id = "abc"
        config = {"x": 1}  # noqa: RUF012
        summary = {}  # noqa: RUF012

        def log(self, row):
            return row

    run = SteadyRun(Run())
    assert (run.id, run.log({"a": 1}), dict(run.config)) == ("abc", {"a": 1}, {"x": 1})
    run.summary["b"] = 2
    run.config.update({"y": 2})
    assert (Run.summary, Run.config) == ({"b": 2}, {"x": 1, "y": 2})
    with pytest.raises(AttributeError):
        run.nothing()


@pytest.mark.parametrize("project", ["a/b", "x" * 200])
def test_a_project_that_wandb_refuses_is_named_with_its_option(project, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ValueError, match=r"expected a project of W&B in logging\.project, got .*Invalid project name"):
        build_wandb_logger(tmp_path, project=project)
