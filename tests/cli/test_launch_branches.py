"""``clmerge fit --launcher`` with branches and clients: the bits of one process, whatever is killed meanwhile."""

import os
import signal
import time

import pytest
from support.launched import LOCAL, LONGEST, assert_same_bits, commands, jobs_of, parent, wait_for
from support.tiny import tiny_clip

from clmerge.cli import main

pytestmark = pytest.mark.usefixtures("no_pictures")

CONFIG = """
stream: {{class_path: ClassIncremental, init_args: {{source: SklearnDigits, num_tasks: 2}}}}
model:
  backbone: {{class_path: OpenClip, init_args: {{name: "{backbone}"}}}}
  loss_classes: seen
  optimizer: {{class_path: AdamW, init_args: {{lr: 3e-3}}}}
mergers: [MagMax, Fisher]
data: {{batch_size: 32}}
learner: {{start_policy: previous, branches: 2, branch_merger: SLERP, statistics_images: 16}}
trainer: {{max_epochs: 2, accelerator: cpu, limit_train_batches: 2, enable_progress_bar: false}}
logging: {{wandb: false, csv: true}}
"""
CLIENTS = [
    "--data.dirichlet=0.5",
    "--learner.branches=4",
    "--learner.branch_fraction=0.5",
    "--learner.rounds=2",
    "--learner.branch_merger=Fisher",
    "--learner.probes=[CommunicatedBytes]",
]
FILES = ["bank/task_001.safetensors", "model/magmax.safetensors", "model/fisher.safetensors"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(backbone=tiny_clip(folder / "clip")))
    return path


def alone_in(folder, config, *words):
    """A run of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
        patch.delenv("CLMERGE_RUN_DIR", raising=False)
        assert main(["fit", "--config", str(config), "--run_dir", str(folder / "run"), *words]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def federated(config, tmp_path_factory):
    return alone_in(tmp_path_factory.mktemp("federated"), config, *CLIENTS)


@pytest.fixture
def start(config):
    with commands(config) as begin:
        yield begin


@pytest.mark.slow
@pytest.mark.parametrize("num_tasks", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_branches_by_jobs_have_the_bits_of_one_process(config, tmp_path, capsys, num_tasks):
    words = [f"--stream.num_tasks={num_tasks}"]
    alone, run, last = alone_in(tmp_path / "alone", config, *words), tmp_path / "run", num_tasks - 1
    assert main(["fit", "--config", str(config), "--run_dir", str(run), *words, *LOCAL]) == 0
    assert_same_bits(run, alone, [f"bank/task_{last:03d}.safetensors", *FILES[1:]])
    told = capsys.readouterr().err
    assert "training 2 of 2 branches of task 1 by LocalLauncher" in told
    assert f"trained task {num_tasks}, branch 2/2: " in told
    assert [*run.glob(f"logs/task_{last:03d}_branch_001/*/metrics.csv")]


@pytest.mark.exhaustive
def test_clients_whose_jobs_and_command_are_killed_have_the_bits_of_one_process(start, federated, tmp_path):
    run = tmp_path / "run"
    driver = start(run, *CLIENTS, *LOCAL)
    wait_for(lambda: [*run.glob("jobs/task_000_branch_*/checkpoints/*.ckpt")])  # in the middle of a round
    killed = jobs_of(run)
    for pid in killed.values():
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: any(len(job) == 2 and job[1] > 1 for job in jobs_of(run)))  # they were trained: the second round
    driver.kill()
    driver.communicate()
    driver = start(run, *CLIENTS, *LOCAL)  # whose jobs wait for those of the killed one
    told, _ = driver.communicate(timeout=LONGEST)
    assert driver.returncode == 0, told
    assert "branches of task 1 by LocalLauncher" in told
    assert "task 1, round 1/2" not in told  # whose fits were merged
    assert_same_bits(run, federated, FILES)


@pytest.mark.exhaustive
@pytest.mark.parametrize("after", [4.0, 8.0, 12.0, 16.0, 24.0])
def test_a_command_killed_at_any_moment_is_taken_up_at_once(start, federated, tmp_path, after):
    run = tmp_path / "run"
    driver = start(run, *CLIENTS, *LOCAL)
    time.sleep(after)
    driver.kill()
    driver.communicate()
    driver = start(run, *CLIENTS, *LOCAL)
    told, _ = driver.communicate(timeout=LONGEST)
    assert driver.returncode == 0, told
    assert_same_bits(run, federated, FILES)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_ray_gives_the_bits_of_one_process(start, federated, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    run = tmp_path / "run"
    driver = start(run, *CLIENTS, "--launcher=ray", "--launcher.jobs=2")
    pid = wait_for(lambda: jobs_of(run) and [*run.glob("jobs/*/checkpoints/*.ckpt")] and jobs_of(run))
    os.kill(parent(next(iter(pid.values()))), signal.SIGKILL)  # a worker of Ray
    told, _ = driver.communicate(timeout=LONGEST)
    assert driver.returncode == 0, told
    assert_same_bits(run, federated, FILES)


def test_one_fit_a_task_that_depends_on_the_one_before_is_refused(config, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["--learner.branches=1", "--learner.branch_merger=null"]
    assert main(["fit", "--config", str(config), "--run_dir", str(run), *words, *LOCAL]) == 1
    assert "or the learner.branches of one task after the other" in capsys.readouterr().err
    assert not run.exists()
