"""Runs of several processes, and of one process among others: torchrun, SLURM, Lightning's own variables."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from support.processes import ended, free_port
from support.records import record, without_times
from support.tiny import tiny_clip

from clmerge.callbacks.progress import EpochLines
from clmerge.cli import main
from clmerge.cli.preflight import check_strategy

CONFIG = """
stream: {{class_path: ClassIncremental, init_args: {{source: SklearnDigits, num_tasks: 2}}}}
model: {{backbone: {{class_path: OpenClip, init_args: {{name: "{backbone}"}}}}, optimizer: {{class_path: AdamW}}}}
mergers: [MagMax, DARE]
data: {{batch_size: 32}}
trainer: {{max_epochs: 1, accelerator: cpu, limit_train_batches: 3, enable_progress_bar: false}}
logging: {{wandb: false, csv: false}}
"""
NODES = ("--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp")
CLUSTER = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "SLURM_PROCID", "CLMERGE_RUN_DIR")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(backbone=tiny_clip(folder / "clip")))
    return path


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
        assert main(["fit", "--config", str(config), "--run_dir", str(run)]) == 0
        patch.delenv("CLMERGE_RUN_DIR")
    return run


@pytest.fixture(autouse=True)
def no_cluster(no_pictures, monkeypatch):
    for name in CLUSTER:
        monkeypatch.delenv(name, raising=False)


def start(words, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in CLUSTER}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", *words],
        env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def torchrun_nodes(words):
    port = str(free_port())
    for rank in range(2):
        launcher = ("--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}", "--master-addr=127.0.0.1")
        yield start(["torch.distributed.run", *launcher, f"--master-port={port}", "-m", "clmerge", *words])


def plain_nodes(words):
    port = str(free_port())
    for rank in range(2):
        yield start(["clmerge", *words], NODE_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


@pytest.fixture(scope="module")
def one_node(config, tmp_path_factory):
    """The run of two processes that Lightning starts on one machine."""
    run = tmp_path_factory.mktemp("one_node") / "run"
    words = ["fit", "--config", str(config), "--run_dir", str(run), "--trainer.devices=2", "--trainer.strategy=ddp"]
    codes, told = ended([start(["clmerge", *words])])
    assert codes == [0], told
    return run


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("nodes", [torchrun_nodes, plain_nodes])
def test_two_nodes_are_one_run(nodes, config, one_node, tmp_path):
    run = tmp_path / "run"
    codes, told = ended([*nodes(["fit", "--config", str(config), "--run_dir", str(run), *NODES])])
    assert codes == [0, 0], told
    assert without_times(record(run))["models"] == without_times(record(one_node))["models"]
    assert (run / "model" / "dare.safetensors").read_bytes() == (one_node / "model" / "dare.safetensors").read_bytes()
    assert sum("results   " in text for text in told) == 1


@pytest.mark.distributed
def test_nodes_need_one_folder_by_name(config, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NODE_RANK", "1")
    assert main(["fit", "--config", str(config), *NODES]) == 1
    told = capsys.readouterr().err
    assert "expected --run_dir, one folder for the 2 processes of this run, got none in process 1" in told
    assert not any(tmp_path.iterdir())


def test_what_spawns_is_refused_before_anything_is_written(config, tmp_path, capsys):
    words = ["--config", str(config), "--run_dir", str(tmp_path / "run"), "--trainer.strategy=ddp_spawn"]
    assert main(["fit", *words, "--trainer.devices=2"]) == 1
    assert "use strategy='ddp'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_shards_is_refused():
    with pytest.raises(ValueError, match="expected whole weights in every process, got ModelParallelStrategy"):
        check_strategy(Trainer(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(), barebones=True))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_rank_ends_the_others_and_the_same_command_goes_on(config, one_node, tmp_path):
    run = tmp_path / "run"
    endless = ("--trainer.max_epochs=10000", "--trainer.limit_train_batches=1")
    words = ["fit", "--config", str(config), "--run_dir", str(run), "--auto_resume", *NODES]
    agents = [*torchrun_nodes([*words, *endless])]
    checkpoint = run / "checkpoints" / "task_000.ckpt"
    until = time.monotonic() + 240
    while not checkpoint.is_file() and time.monotonic() < until and agents[0].poll() is None:
        time.sleep(0.1)
    assert checkpoint.is_file(), [agent.kill() or agent.communicate()[0] for agent in agents]
    for worker in children(agents[1].pid):
        os.kill(worker, signal.SIGKILL)
    begun = time.monotonic()
    codes, told = ended(agents, timeout=60)
    assert time.monotonic() - begun < 60
    assert 0 not in codes
    assert "clmerge fit: ended since another process of this run did" in told[0], told[0]
    assert f"resume with clmerge fit --resume {run}" in told[0]


def children(pid):
    return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_run_beside_others_in_a_slurm_step_is_its_own_first_process(config, alone, tmp_path, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    run = tmp_path / "run"
    assert main(["fit", "--config", str(config), "--run_dir", str(run)]) == 0
    assert without_times(record(run))["models"] == without_times(record(alone))["models"]


SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


def signalled_in_the_second_task(self, trainer, module, batch, batch_idx):
    if trainer.datamodule.task == 1 and batch_idx == 1:
        os.kill(os.getpid(), signal.SIGUSR1)


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """A job of SLURM, with a scontrol that writes down what it is asked for."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tools / "scontrol").chmod(0o755)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "asked"


def test_a_job_before_its_time_limit_is_requeued_and_resumes_to_the_same_bits(
    config, alone, slurm, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    command = ["fit", "--config", str(config), "--run_dir", str(run), "--auto_resume"]
    with monkeypatch.context() as patch:
        patch.setattr(EpochLines, "on_train_batch_start", signalled_in_the_second_task)
        assert main(command) == 128 + signal.SIGUSR1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "clmerge fit: stopped by SIGUSR1; job 77 is requeued and will resume the run"
    )
    assert slurm.read_text() == "requeue 77\n"
    assert not [*run.rglob("hpc_ckpt*")]
    (run / "hpc_ckpt_1.ckpt").write_text("of an older version")
    assert main([*command, "--seed=1"]) == 1
    assert "got 'seed: 1' where it had 'seed: 0'" in capsys.readouterr().err
    assert main(command) == 0
    assert without_times(record(run))["models"] == without_times(record(alone))["models"]
    for name in ("model/magmax.safetensors", "model/dare.safetensors"):
        assert (run / name).read_bytes() == (alone / name).read_bytes(), name
    assert not [*run.rglob("hpc_ckpt*")]
    monkeypatch.setattr("clmerge.figures.plot_files", lambda results, folder: [])
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(f"{run} is complete: 2 of 2 tasks")


def test_a_job_whose_command_does_not_resume_is_not_requeued(config, slurm, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    monkeypatch.setattr(EpochLines, "on_train_batch_start", signalled_in_the_second_task)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert main(["fit", "--config", str(config), "--run_dir", str(run)]) == 128 + signal.SIGUSR1
    assert "with --run_dir and --auto_resume the job would have been requeued" in capsys.readouterr().err
    assert not slurm.exists()
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--auto_resume"])
    assert "expected --run_dir beside --auto_resume" in capsys.readouterr().err
