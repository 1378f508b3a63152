"""Two processes of one run hold the same statistics, routers and calibrated models, whatever each of them computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ended, free_port
from support.records import record
from support.tiny import tiny_clip

CONFIG = """
stream: {class_path: ClassIncremental, init_args: {source: SklearnDigits, num_tasks: 2, val_fraction: 0.1}}
model: {backbone: {class_path: OpenClip, init_args: {name: CLIP}}, loss_classes: all, optimizer: {class_path: AdamW}}
mergers: [TaskArithmetic, EMR]
learner:
  statistics_images: 32
  routings:
    - {class_path: Smile, init_args: {rank: 4, gate_k: 2}}
    - {class_path: GaussianPosterior, init_args: {rank: 4}}
    - {class_path: TwinMerging, init_args: {rank: 4, steps: 2}}
    - {class_path: Mingle, init_args: {rank: 4, steps: 2}}
    - {class_path: WEMoE, init_args: {rank: 4, steps: 2}}
  calibrations: [Repair, {class_path: Surgery, init_args: {steps: 2}}]
data: {batch_size: 32}
trainer: {max_epochs: 1, accelerator: cpu, limit_train_batches: 2, enable_progress_bar: false}
logging: {wandb: false, csv: false}
"""

SCRIPT = """
import hashlib, json, os, sys
import torch
from clmerge.cli import main
from clmerge.deploy.calibration import CalibratedModels
from clmerge.deploy.routing.routed_models import RoutedModels
from clmerge.models import OpenClip

share = 1 + int(os.environ["NODE_RANK"]) / 100
forward, told = OpenClip.forward, {}

def digest(value):
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()
    return {str(key): digest(one) for key, one in value.items()} if isinstance(value, dict) else repr(value)

def of_routings(self, merge, tasks, device):
    predictors = self.predictors(merge, ["emr+gaussian"], tasks, device)
    found = final(self, merge, tasks, device)
    told["routing"] = digest(self.state_dict())
    told["routed"] = digest({name: model.state_dict() for name, model in found.items()})
    told["views"] = digest(predictors["emr+gaussian"]._router.state_dict())
    return found

def of_calibrations(self, merged, task, device):
    told["calibration"] = digest(self.state_dict())
    told["calibrated"] = digest(self.models(merged, task, device))
    return files(self, merged, task, device)

# Each process sees other images than the other, as two devices compute other last bits of the same ones.
OpenClip.forward = lambda self, images: forward(self, images * share)
final, RoutedModels.final = RoutedModels.final, of_routings
files, CalibratedModels.final = CalibratedModels.final, of_calibrations
code = main(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    json.dump(told, file)
raise SystemExit(code)
"""


@pytest.mark.distributed
def test_every_process_has_what_rank_zero_collected_and_built(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.replace("CLIP", str(tiny_clip(tmp_path / "clip"))))
    (tmp_path / "script.py").write_text(SCRIPT)
    kept = {name: value for name, value in os.environ.items() if name != "CLMERGE_RUN_DIR"}
    kept |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    kept |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    words = ["fit", "--config", str(tmp_path / "config.yaml"), "--run_dir", str(tmp_path / "run")]
    words += ["--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(tmp_path / "script.py"), str(tmp_path / f"{rank}.json"), *words],
            env=kept | {"NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    codes, said = ended(processes, timeout=600)
    assert codes == [0, 0], said
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert set(first) == {"routing", "routed", "views", "calibration", "calibrated"}
    for part in first:
        assert first[part] == second[part], part
    results = record(tmp_path / "run")
    probe = results["models"]["task_arithmetic+smile"]["probes"]["routing_accuracy"]
    assert probe["n"] == results["samples"], "the images of both processes count"
