"""The tables of docs/trajectories.md are what scripts/trajectory_table.py makes of the committed figures."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "results" / "trajectory.json"


def test_the_tables_are_made_from_the_committed_figures():
    command = [sys.executable, ROOT / "scripts" / "trajectory_table.py", "--results", FIGURES]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    page = (ROOT / "docs" / "trajectories.md").read_text(encoding="utf-8")
    tables = printed.split("\n\n")
    figures = json.loads(FIGURES.read_text())
    assert len(tables) == len(figures)
    assert {"digits", "grey"} <= figures.keys()
    for table, ways in zip(tables, figures.values(), strict=True):
        assert table in page
        assert len(table.splitlines()) == len(ways) + 2
        assert "last" in ways
        assert {len(values) for row in ways.values() for values in row.values()} == {3}
