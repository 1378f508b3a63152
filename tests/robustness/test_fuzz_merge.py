"""Damaged and hostile inputs of ``clmerge merge`` from a seed; scripts/checks/fuzz_merge.py makes and judges them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "checks" / "fuzz_merge.py"


def faults(seed, *, count, seconds):
    # The script runs the python that lies beside the command it is given.
    command = Path(sys.executable).with_name("clmerge")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    found = subprocess.run(
        [sys.executable, SCRIPT, command, str(seed), str(seconds), f"--count={count}", "--strict"],
        capture_output=True,
        text=True,
        env=environment,
    )
    done = re.search(r"fuzz_merge: (\d+) inputs", found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr
    assert done is not None
    return int(done[1])


@pytest.mark.slow
def test_some_hundred_inputs():
    assert faults(0, count=250, seconds=400) == 250


@pytest.mark.exhaustive
def test_many_thousand_inputs():
    assert faults(1, count=20_000, seconds=20_000) == 20_000
