"""Seeded runs of scripts/checks/fuzz_report.py: hostile names and damaged documents for ``clmerge report``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.comparisons import make_diagnostics, write_comparison

SCRIPT = Path(__file__).parents[2] / "scripts" / "checks" / "fuzz_report.py"


def fuzz(folder, *arguments):
    write_comparison(folder, diagnostics=make_diagnostics())
    command = [sys.executable, SCRIPT, "--run", folder / "run0", "--compare", folder / "compare", *arguments]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "; 0 faults" in done.stdout
    return int(done.stdout.split()[1])


@pytest.mark.slow
def test_a_short_run_finds_no_fault(tmp_path):
    assert fuzz(tmp_path, "--seed", "1", "--documents", "60") == 60


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_a_long_run_finds_no_fault(tmp_path, seed):
    assert fuzz(tmp_path, "--seed", str(seed), "--documents", "3000") == 3000
