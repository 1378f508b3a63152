"""Seeded runs of scripts/checks/fuzz_report.py: hostile names and damaged documents for ``clmerge report``."""

import pytest
from fuzz_report import Fuzzer
from support.comparisons import make_diagnostics, write_comparison
from support.seeded_checks import run_check


def test_some_documents(tmp_path):
    write_comparison(tmp_path, diagnostics=make_diagnostics())
    (tmp_path / "tried").mkdir()
    fuzzer = Fuzzer(tmp_path / "tried", tmp_path / "run0", tmp_path / "compare", seed=1)
    for number in range(1, 41):  # of these, it writes no PNG; tests/report/test_hostile.py does with hostile names
        fuzzer.one(number)
    assert fuzzer.faults == {}
    assert min(fuzzer.counts[outcome] for outcome in ("pages", "tables", "messages")) > 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_a_long_run_finds_no_fault(tmp_path, seed):
    write_comparison(tmp_path, diagnostics=make_diagnostics())
    folders = ["--run", tmp_path / "run0", "--compare", tmp_path / "compare"]
    assert run_check("fuzz_report", "--seed", seed, "--documents", 800, *folders) == 800
