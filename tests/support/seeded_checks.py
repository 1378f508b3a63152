"""Run scripts/checks, which disturb clmerge by seed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parents[2] / "scripts" / "checks"
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc for the library that disturbs file calls")


def run_check(script, *arguments):
    """Run a check, which must find nothing; return how often it disturbed something."""
    environment = os.environ | {"PYTHONPATH": str(CHECKS.parents[1])}
    command = [sys.executable, str(CHECKS / f"{script}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "; 0 faults" in done.stdout
    return int(done.stdout.split()[1])
