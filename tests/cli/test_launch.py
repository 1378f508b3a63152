"""``clmerge fit --launcher``: the bits of one process, whatever is killed meanwhile."""

import os
import signal
import time

import pytest
from support.launched import LOCAL, LONGEST, assert_same_bits, commands, jobs_of, parent, wait_for
from support.tiny import tiny_clip

from clmerge.cli import main

pytestmark = pytest.mark.usefixtures("no_pictures")

CONFIG = """
stream: {{class_path: ClassIncremental, init_args: {{source: SklearnDigits, num_tasks: 3}}}}
model:
  backbone: {{class_path: OpenClip, init_args: {{name: "{backbone}"}}}}
  tuning: {tuning}
  loss_classes: seen
  optimizer: {{class_path: AdamW, init_args: {{lr: 3e-3}}}}
mergers: [MagMax, DARE, Fisher, {{class_path: WeightAverage}}]
data: {{batch_size: 32}}
learner: {{start_policy: base, statistics_images: 16}}
trainer: {{max_epochs: 2, accelerator: cpu, limit_train_batches: 2, enable_progress_bar: false}}
logging: {{wandb: false, csv: true}}
"""
FILES = ["bank/task_002.safetensors", *(f"model/{name}.safetensors" for name in ("magmax", "dare", "fisher"))]


def write_config(folder, tuning="Full"):
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(backbone=tiny_clip(folder / "clip"), tuning=tuning))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The run of one process, with as many threads as the jobs."""
    run = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
        patch.delenv("CLMERGE_RUN_DIR", raising=False)
        assert main(["fit", "--config", str(config), "--run_dir", str(run)]) == 0
    return run


@pytest.fixture
def start(config):
    with commands(config) as begin:
        yield begin


@pytest.mark.slow
def test_jobs_give_the_bits_of_one_process(config, alone, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["fit", "--config", str(config), "--run_dir", str(run), *LOCAL]) == 0
    assert_same_bits(run, alone, FILES)
    told = capsys.readouterr().err
    assert "training 3 of 3 tasks by LocalLauncher" in told
    assert "trained task 3: " in told
    assert (run / "config.yaml").read_text() == (alone / "config.yaml").read_text()
    assert [*run.glob("logs/task_001/*/metrics.csv")]


@pytest.mark.slow
def test_whoever_is_killed_the_same_command_ends_with_the_same_bits(start, alone, tmp_path):
    run = tmp_path / "run"
    driver = start(run, *LOCAL)
    wait_for(lambda: [*run.glob("jobs/task_00*/checkpoints/*.ckpt")])  # in the middle of a task
    killed = jobs_of(run)
    for pid in killed.values():
        os.kill(pid, signal.SIGKILL)
    again = wait_for(lambda: {task: pid for task, pid in jobs_of(run).items() if pid not in killed.values()})
    driver.kill()
    driver.communicate()
    wait_for(lambda: not set(jobs_of(run).values()) & set(again.values()), seconds=120)  # they end with the driver
    driver = start(run, *LOCAL)
    told, _ = driver.communicate(timeout=LONGEST)
    assert driver.returncode == 0, told
    assert_same_bits(run, alone, FILES)


@pytest.mark.exhaustive
@pytest.mark.parametrize("after", [1.0, 3.0, 6.0, 9.0])
def test_a_driver_killed_at_any_moment_is_taken_up_at_once(start, alone, tmp_path, after):
    run = tmp_path / "run"
    driver = start(run, *LOCAL)
    time.sleep(after)
    driver.kill()
    driver.communicate()
    driver = start(run, *LOCAL)  # whose jobs wait for those of the killed one
    told, _ = driver.communicate(timeout=LONGEST)
    assert driver.returncode == 0, told
    assert_same_bits(run, alone, FILES)


@pytest.mark.slow
def test_a_job_that_fails_ends_the_run_with_its_words_and_one_process_goes_on(config, alone, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(broken(tmp_path)) + os.pathsep + os.environ.get("PYTHONPATH", ""))
        assert main(["fit", "--config", str(config), "--run_dir", str(run), *LOCAL]) == 1
    told = capsys.readouterr().err
    assert "expected task 2 to be done by a job, got exit code 1" in told
    assert "expected a sound disk, got none" in told
    assert main(["fit", "--resume", str(run)]) == 0
    assert_same_bits(run, alone, FILES)


def broken(folder):
    """A folder whose ``sitecustomize`` fails the job of task 2."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'clmerge.cli.train_task' in sys.orig_argv and sys.orig_argv[-1] == '1':\n"
        "    print('expected a sound disk, got none', flush=True)\n"
        "    import os\n"
        "    os._exit(1)\n"
    )
    return folder / "site"


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["LoRA"])
def test_drawn_factors_are_those_of_the_task(tuning, tmp_path):
    config = write_config(tmp_path, tuning)
    runs = tmp_path / "alone", tmp_path / "jobs"
    for run, words in zip(runs, ([], LOCAL), strict=True):
        assert main(["fit", "--config", str(config), "--run_dir", str(run), *words]) == 0
    assert_same_bits(runs[1], runs[0], FILES)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_ray_gives_the_bits_of_one_process(start, alone, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    run = tmp_path / "run"
    driver = start(run, "--launcher=ray", "--launcher.jobs=2")
    pid = wait_for(lambda: jobs_of(run) and [*run.glob("jobs/*/checkpoints/*.ckpt")] and jobs_of(run))
    os.kill(parent(next(iter(pid.values()))), signal.SIGKILL)  # a worker of Ray
    told, _ = driver.communicate(timeout=LONGEST)
    assert driver.returncode == 0, told
    assert_same_bits(run, alone, FILES)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_node_of_a_ray_cluster_that_dies_loses_no_bits(start, alone, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # Beside other programs Ray's own niceness of 15 would leave the jobs no time.
    for name, value in (("USAGE_STATS_ENABLED", "0"), ("AUTH_MODE", "disabled"), ("worker_niceness", "0")):
        monkeypatch.setenv(f"RAY_{name}", value)
    store = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
    run = tmp_path / "run"
    try:
        nodes = [cluster.add_node(num_cpus=1, **store) for _ in range(2)]
        driver = start(run, "--launcher=ray", f"--launcher.address={cluster.address}")
        wait_for(lambda: [*run.glob("jobs/*/checkpoints/*.ckpt")], seconds=LONGEST)
        (raylet,) = nodes[0].all_processes["raylet"]
        raylet.process.kill()  # with SIGKILL; its workers end, and their jobs with them
        told, _ = driver.communicate(timeout=LONGEST)
        assert driver.returncode == 0, told
        assert_same_bits(run, alone, FILES)
    finally:
        cluster.shutdown()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learner.start_policy=previous"], "expected learner.start_policy=base, got 'previous'"),
        (["--data.replay=2"], "expected data.replay=0, got 2"),
        (["--model.head=LinearHead"], "expected a head that knows all classes"),
        (["--model.regularizers=[EWC]"], "expected no regularizers"),
        (["--trainer.devices=2", "--trainer.strategy=ddp"], "expected one process for --launcher"),
    ],
)
def test_what_cannot_be_spread_is_refused_before_anything_starts(config, words, message, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["fit", "--config", str(config), "--run_dir", str(run), *words, *LOCAL]) == 1
    assert message in capsys.readouterr().err
    assert not run.exists()


def test_a_launcher_is_known_by_its_short_name_or_not_at_all(config, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--launcher=slurm"])
    assert "slurm" in capsys.readouterr().err
