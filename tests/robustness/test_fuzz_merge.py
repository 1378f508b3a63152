"""Damaged and hostile inputs of ``clmerge merge`` from a seed; scripts/checks/fuzz_merge.py makes and judges them."""

import sys
from pathlib import Path

import pytest
from merge_files import use_sound_files
from merge_judge import judged, make_case
from support.seeded_checks import run_check

from clmerge.cli import main


@pytest.mark.filterwarnings("ignore")
def test_some_inputs_of_every_category(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUZZ_CANARY", str(tmp_path / "canary"))
    use_sound_files(0)
    tried = set()
    for number in range(60):
        category, case = make_case(tmp_path / "case", 0, number)
        found = judged(case, main, tmp_path / "canary", None)
        assert found["verdict"] in ("ok", "clean"), (category, number, found)
        tried.add(category)
    assert len(tried) == 11


@pytest.mark.exhaustive
def test_many_thousand_inputs():
    # The script runs the python that lies beside the command it is given.
    command = Path(sys.executable).with_name("clmerge")
    assert run_check("fuzz_merge", command, 1, 20_000, "--count=20000", "--strict") == 20_000
