"""The table of docs/probes.md is what scripts/trust_table.py makes of the committed figures."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "results" / "trust.json"


def test_the_table_is_made_from_the_committed_figures():
    command = [sys.executable, ROOT / "scripts" / "trust_table.py", "--results", FIGURES]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert printed in (ROOT / "docs" / "probes.md").read_text(encoding="utf-8")
    figures = json.loads(FIGURES.read_text())["figures"]
    seeds = {len(values) for row in figures.values() for values in row.values()}
    assert len(seeds) == 1, "every model has every seed"
    assert len(printed.splitlines()) == len(figures) + 2
