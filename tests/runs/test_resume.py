import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.kill_driver import POINTS
from support.records import record, without_times
from support.tiny import tiny_clip

DRIVER = Path(__file__).parents[1] / "support" / "kill_driver.py"
CONFIG = """
name: killed
stream:
  class_path: ClassIncremental
  init_args: {{source: SklearnDigits, num_tasks: 3, val_fraction: 0.1}}
model:
  backbone: {{class_path: OpenClip, init_args: {{name: "{backbone}"}}}}
  loss_classes: all
  optimizer: {{class_path: AdamW, init_args: {{lr: 3e-3}}}}
mergers: [MagMax, TIES, RandomMix]
data: {{batch_size: 64}}
learner: {{start_policy: merged}}
trainer: {{max_epochs: 2, accelerator: cpu, log_every_n_steps: 1, limit_train_batches: 6, limit_val_batches: 2}}
logging: {{wandb: false}}
"""


LORA = "  tuning: {{class_path: LoRA, init_args: {{rank: 2}}}}\n  loss_classes"
FEW = (
    "between the last checkpoint of the first task and its merge",
    "between epochs",
    "inside a checkpoint write",
    "between the merge and its commit",
    "between the merge and the evaluation",
)
LORA_POINTS = ("between epochs", "between the last checkpoint and the merge")


def drive(out, config, points=()):
    (out / "config.yaml").write_text(config.format(backbone=tiny_clip(out / "clip")))
    command = [sys.executable, str(DRIVER), str(out / "config.yaml"), str(out), *points]
    found = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert (out / "codes.json").is_file(), found.stderr[-3000:]
    return out, json.loads((out / "codes.json").read_text()), found.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return drive(tmp_path_factory.mktemp("runs"), CONFIG, FEW)


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory):
    return drive(tmp_path_factory.mktemp("runs"), CONFIG, [point for point in POINTS if point not in FEW])


def contents(run):
    """The results without seconds, and the hashes of all weights."""
    results = without_times(record(run))
    files = sorted([*run.glob("model/*"), *run.glob("bank/*")])
    return results, {f"{f.parent.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.slow
@pytest.mark.parametrize("point", FEW)
def test_a_killed_run_resumes_to_the_same_bits(runs, point):
    check(runs, point)


@pytest.mark.exhaustive
@pytest.mark.parametrize("point", [point for point in POINTS if point not in FEW])
def test_a_run_that_is_killed_elsewhere_resumes_to_the_same_bits(more_runs, point):
    check(more_runs, point)


def check(runs, point):
    out, codes, log = runs
    assert codes["whole"] == [0], log[-3000:]
    assert codes[point] == [-9, 0], log[-3000:]
    results, hashes = contents(out / point)
    expected_results, expected_hashes = contents(out / "whole")
    assert results == expected_results
    assert hashes == expected_hashes
    assert len(hashes) == 7  # three vectors, three models, and the statement of what these were made from
    left = [p for p in (out / point).rglob("*") if p.name.endswith(".tmp") or "checkpoints" in p.parent.name]
    assert left == []
    assert [p.name for p in (out / point / "state").iterdir()] == ["task_002"]


@pytest.mark.exhaustive
def test_a_killed_run_of_adapters_resumes_to_the_same_bits(tmp_path):
    config = CONFIG.replace("  loss_classes", LORA).replace("start_policy: merged", "start_policy: previous")
    out, codes, log = drive(tmp_path, config, LORA_POINTS)
    assert codes.pop("whole") == [0], log[-3000:]
    whole = contents(out / "whole")
    for point, code in codes.items():
        assert code == [-9, 0], log[-3000:]
        assert contents(out / point) == whole, point
