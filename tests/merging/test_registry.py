import gc

import pytest

from clmerge.merging import Gram, MagMax, Merger, Spectral, Stored, Sum, WeightedSum, registered_mergers

NAMES = "WeightAverage TaskArithmetic MagMax TIES DARE ModelStock GreedySoup WiSEFT PAINT RandomMix Pipeline"


def test_rules_are_found_by_their_class_names():
    assert set(registered_mergers()) >= set(NAMES.split())
    names = [rule.name for rule in registered_mergers().values()]
    assert len(set(names)) == len(names)


def test_a_second_rule_of_one_name_is_refused():
    twin = type("TwinOfMagMax", (MagMax,), {})
    with pytest.raises(RuntimeError, match="one merger called 'magmax'"):
        registered_mergers()
    del twin
    gc.collect()  # classes are part of reference cycles; the registry must forget this one
    assert "TwinOfMagMax" not in registered_mergers()


@pytest.mark.parametrize("base", [Gram, Merger, Spectral, Stored, Sum, WeightedSum])
def test_a_base_has_no_name_and_cannot_be_made(base):
    assert base.__name__ not in registered_mergers()
    with pytest.raises(TypeError, match=r"abstract.*name"):
        base()
