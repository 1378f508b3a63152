"""Seeded runs of scripts/checks that disturb commands and damage runs: all ends with the same bits, or in words."""

import kill_points
import pytest
import resume_faults
from forks import Forks
from support.seeded_checks import needs_gcc, run_check

pytestmark = needs_gcc


@pytest.mark.slow
def test_some_disturbances_of_merges_and_some_damages_to_a_run(tmp_path):
    """In one test, because the process that both fork from takes as long to start as either."""
    with Forks(tmp_path) as forks:
        order = ["--seed=1", "--points=1", "--what=shards"]
        tester = kill_points.Tester(forks, kill_points.build_parser().parse_args(order))
        tester.sweep()
        order = ["--seed=1", "--variants=fit", "--only=three at once,checkpoint flipped,bank swapped,disk full"]
        counts, faults = resume_faults.resume(forks, resume_faults.build_parser().parse_args(order))
    assert tester.faults == []
    assert faults == []
    assert tester.number == 8
    assert counts == {"went on": 2, "refused": 2}


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", ["fit", "branches", "statistics", "merge,shards", "report", "compare"])
def test_a_command_that_is_disturbed_anywhere_leaves_nothing_and_goes_on(what):
    assert run_check("kill_points", "--seed", 2, "--points", 20, "--what", what) >= 100


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_every_damage_to_every_kind_of_run_is_passed_over_or_refused(seed):
    assert run_check("resume_faults", "--seed", seed) >= 140
