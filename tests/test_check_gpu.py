"""The check for machines with a GPU, on tiny shapes wherever there is none."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_gpu.py"


def test_the_check_passes_on_tiny_shapes():
    command = [sys.executable, SCRIPT, "--tiny", "--only", "merge", "spectral", "evaluate"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "WRONG" not in result.stdout
    for rule in ("TIES by tensor", "TSVM", "Evaluating 8 models in one pass"):
        assert rule in result.stdout
