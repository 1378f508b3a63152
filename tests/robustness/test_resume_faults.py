"""Seeded runs of scripts/checks/resume_faults.py: run folders that were moved, damaged, shared or starved."""

import pytest
from support.seeded_checks import needs_gcc, run_check

pytestmark = needs_gcc
SOME = "three at once,checkpoint flipped,bank swapped,disk full"


@pytest.mark.slow
def test_a_damaged_run_is_resumed_to_the_same_bits_or_refused():
    assert run_check("resume_faults", "--seed", 1, "--variants", "fit", "--only", SOME) == 4


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_every_damage_to_every_kind_of_run_is_passed_over_or_refused(seed):
    assert run_check("resume_faults", "--seed", seed) >= 140
