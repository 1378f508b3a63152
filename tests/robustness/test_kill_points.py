"""Seeded runs of scripts/checks/kill_points.py: commands are disturbed at any moment and go on to the same bits."""

import pytest
from support.seeded_checks import needs_gcc, run_check

pytestmark = needs_gcc


@pytest.mark.slow
def test_a_merge_that_is_disturbed_leaves_nothing_and_goes_on():
    assert run_check("kill_points", "--seed", 1, "--points", 1, "--what", "merge,shards") == 16


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", ["fit", "branches", "statistics", "merge,shards", "report", "compare"])
def test_a_command_that_is_disturbed_anywhere_leaves_nothing_and_goes_on(what):
    assert run_check("kill_points", "--seed", 2, "--points", 20, "--what", what) >= 100
