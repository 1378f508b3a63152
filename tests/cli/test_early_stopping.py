"""Early stopping and the best weights through ``clmerge fit``, on the embedded nano model."""

import re
from pathlib import Path

import pytest
import torch
from support.records import record, without_times

from clmerge.callbacks import MergeCallback
from clmerge.cli import main
from clmerge.weights import load_tensors

CONFIG = Path(__file__).parents[2] / "configs" / "early_stopping.yaml"
SMALL = ["--stream.num_tasks=2", "--stream.source.test_fraction=0.05", "--model.optimizer.lr=5e-3"]
QUIET = ["--logging.wandb=false", "--trainer.enable_progress_bar=false", "--mergers", "MagMax"]


def fit(folder, *more):
    return main(["fit", "--config", str(CONFIG), "--run_dir", str(folder), *SMALL, *QUIET, *more])


@pytest.mark.slow
def test_every_task_stops_by_itself_and_merges_its_best_epoch(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CLMERGE_RUN_DIR", raising=False)
    assert fit(tmp_path / "whole") == 0
    told = capsys.readouterr().err
    best = [int(number) for number in re.findall(r"weights of epoch (\d+), the best by val/loss", told)]
    last = [max(int(n) for n in re.findall(rf"task {task}/2.*: epoch (\d+)/20", told)) for task in (1, 2)]
    assert len(best) == 2
    for first, end in zip(best, last, strict=True):
        assert end in (first + 2, 20)
    assert min(last) < 20, "no task stopped early"

    # Killed after the last checkpoint of the first task and before its merge; resumed, it must not train on.
    commit = MergeCallback.commit

    def killed(*arguments, **options):
        raise RuntimeError("killed")

    monkeypatch.setattr(MergeCallback, "commit", killed)
    assert fit(tmp_path / "resumed") == 1
    monkeypatch.setattr(MergeCallback, "commit", commit)
    capsys.readouterr()
    assert main(["fit", "--resume", str(tmp_path / "resumed")]) == 0
    assert not re.search("task 1/2 .*: epoch", capsys.readouterr().err)
    weights = [load_tensors(tmp_path / name / "model" / "magmax.safetensors") for name in ("whole", "resumed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert without_times(record(tmp_path / "whole")) == without_times(record(tmp_path / "resumed"))


def test_a_monitor_that_is_not_logged_is_refused_before_the_run(tmp_path, capsys):
    options = ["--trainer.callbacks=[{class_path: BestWeights, init_args: {monitor: val/los}}]"]
    assert fit(tmp_path / "run", *options) == 1
    assert "expected a metric for BestWeights to monitor" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
