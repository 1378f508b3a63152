"""The benchmark of learned rules measures what it says, on shapes whose times and sizes mean nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny import tiny_clip

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_adaptive.py"


@pytest.mark.exhaustive
def test_the_benchmark_of_learned_rules_runs_on_tiny_shapes(tmp_path):
    options = ["--model", tiny_clip(tmp_path / "clip"), "--tasks", "2", "--images", "1", "--steps", "1"]
    result = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=300)
    assert result.returncode in (0, 1), result.stderr
    assert re.search(r"plain: [0-9.]+ CPU s a step, [0-9.]+ models", result.stdout)
    assert re.search(r"2 tasks of 1 images: a step takes [0-9.]+ times as long", result.stdout)
