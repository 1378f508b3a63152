"""Averages along a fit in two processes: the same bits on both, those of one process, and after a resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from support.tiny import ForeignModule, toy_loader

from clmerge.callbacks import MergeCallback, Population, Sparse, Subspace, TrajectoryAverage
from clmerge.merging import MagMax
from clmerge.training.exchange_rules import Pull
from clmerge.training.trajectory import EMA, Latest, Mean
from clmerge.weights import load_tensors

CALLBACKS = {
    "mean": lambda: TrajectoryAverage(Mean(start=0.25, every=1)),
    "ema": lambda: TrajectoryAverage(EMA(0.7, validates="average")),
    "latest": lambda: TrajectoryAverage(Latest(2)),
    "papa": lambda: Population(2, Pull(0.9), settings=[{"lr": 0.1}, {"lr": 0.05}]),
    "subspace": lambda: Subspace(3, start=0.5),
    "sparse": lambda: Sparse(0.5),
}
SHARDED = ("mean", "ema", "latest")

SCRIPT = """
import json, os, sys, torch
from pathlib import Path
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from callbacks.test_averaging_ranks import CALLBACKS, SHARDED
from support.tiny import ForeignModule, toy_loader
from clmerge.callbacks import MergeCallback
from clmerge.merging import MagMax
from clmerge.weights import fingerprint, save_tensors

class Sharded(ForeignModule):
    def configure_model(self):
        if not hasattr(self, "done"):
            for layer in (self.net[0], self.net[3]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            self.done = True

class Kill(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 3:
            raise RuntimeError("killed")

strategy, out = sys.argv[1], Path(sys.argv[2])
sharded = strategy == "fsdp2"

def fit(name, *, kill=False, saving=None, ckpt_path=None):
    torch.manual_seed(0)
    module = Sharded() if sharded else ForeignModule()
    base = {key: p.detach().clone() for key, p in ForeignModule.named_parameters(module)}
    merge = MergeCallback(MagMax(scale=1.0), base=base)
    how = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if sharded else "ddp"
    trainer = Trainer(max_epochs=4, accelerator="cpu", devices=2, strategy=how, logger=False, num_sanity_val_steps=0,
        callbacks=[merge, CALLBACKS[name](), *([Kill()] if kill else []), *([saving] if saving else [])],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=saving is not None,
        use_distributed_sampler=False)
    data, rank = toy_loader(0).dataset, int(os.environ.get("LOCAL_RANK", 0))
    own = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)  # every other sample
    trainer.fit(module, DataLoader(data, batch_size=4, sampler=own), toy_loader(1), ckpt_path=ckpt_path)
    return merge.merged_vector(), trainer

found = {}
for name in CALLBACKS:
    if sharded and name not in SHARDED:
        try:
            fit(name)
        except RuntimeError as error:
            found[name] = str(error)
        continue
    whole, trainer = fit(name)
    prints = [None, None]
    torch.distributed.all_gather_object(prints, fingerprint(whole))
    saving = ModelCheckpoint(dirpath=out / name, filename="last", enable_version_counter=False)
    try:
        fit(name, kill=True, saving=saving)
    except RuntimeError as error:
        assert str(error) == "killed", error
    saving = ModelCheckpoint(dirpath=out / name, filename="last", enable_version_counter=False)
    again, trainer = fit(name, saving=saving, ckpt_path=out / name / "last.ckpt")
    found[name] = {"ranks": prints[0] == prints[1], "resumed": fingerprint(again) == fingerprint(whole)}
    if trainer.is_global_zero:
        save_tensors(out / f"{name}.safetensors", whole)
if trainer.is_global_zero:
    (out / "found.json").write_text(json.dumps(found))
"""


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_average_what_one_process_averages(tmp_path, strategy):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "script.py"), strategy, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert (tmp_path / "found.json").is_file(), done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for name, build in CALLBACKS.items():
        if strategy == "fsdp2" and name not in SHARDED:
            assert "expected whole weights in every process for" in found[name]
            continue
        assert found[name] == {"ranks": True, "resumed": True}, name
        torch.manual_seed(0)
        module = ForeignModule()
        merge = MergeCallback(MagMax(scale=1.0))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(
            max_epochs=4,
            accelerator="cpu",
            num_sanity_val_steps=0,
            enable_model_summary=False,
            callbacks=[merge, build()],
            **quiet,
        )
        trainer.fit(module, toy_loader(0), toy_loader(1))
        expected, merged = merge.merged_vector(), load_tensors(tmp_path / f"{name}.safetensors")
        for key, value in expected.items():
            torch.testing.assert_close(merged[key], value, rtol=1e-4, atol=1e-6, msg=f"{name} {key}")
