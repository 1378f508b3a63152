"""The check for machines with a GPU, on tiny shapes wherever there is none."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_gpu.py"


@pytest.mark.exhaustive
def test_the_benchmark_of_averages_runs_on_tiny_shapes():
    command = [sys.executable, SCRIPT.with_name("bench_trajectory.py"), "--tiny"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "Lightning's EMA, all of CLIP" in result.stdout


PARTS = {"merge": "TIES by tensor", "spectral": "TSVM", "evaluate": "Evaluating 8 models in one pass"}
PARTS |= {"operations": "| rule | one at a time | many at once |"}


@pytest.mark.parametrize(
    "part", [part if part == "evaluate" else pytest.param(part, marks=pytest.mark.exhaustive) for part in PARTS]
)
def test_the_check_passes_on_tiny_shapes(part):
    command = [sys.executable, SCRIPT, "--tiny", "--only", part]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "WRONG" not in result.stdout
    assert PARTS[part] in result.stdout
