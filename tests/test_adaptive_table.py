"""The table of docs/adaptive.md is what scripts/adaptive_table.py makes of the committed figures."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "results" / "adaptive.json"


def test_the_table_is_made_from_the_committed_figures():
    command = [sys.executable, ROOT / "scripts" / "adaptive_table.py", "--results", FIGURES]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert printed in (ROOT / "docs" / "adaptive.md").read_text(encoding="utf-8")
    figures = json.loads(FIGURES.read_text())
    seeds = {name: len(row["aware"]) for name, row in figures["q"].items()}
    assert max(seeds.values()) == 3
    assert len(printed.splitlines()) == len(figures["q"]) + 2
