import re

import pytest

from clmerge.deploy.naming import check_names, check_requirements, name_mergers
from clmerge.merging import TIES, Fisher, GreedySoup, MagMax


def test_mergers_go_by_name_and_by_settings_where_a_class_comes_twice():
    assert list(name_mergers([MagMax(), TIES()])) == ["magmax", "ties"]
    twice = list(name_mergers([TIES(density=0.1), TIES(density=0.3), MagMax()]))
    assert len(set(twice)) == 3
    assert all("density" in name for name in twice[:2])
    assert list(name_mergers({"mine": MagMax()})) == ["mine"]
    with pytest.raises(ValueError, match="twice"):
        name_mergers([MagMax(), MagMax()])
    with pytest.raises(ValueError, match="at least one merger"):
        name_mergers([])


@pytest.mark.parametrize(
    "name", ["expert", "zero_shot", "task_oracle", "ensemble", "joint", "head", "base", "magmax+tuned"]
)
def test_names_of_what_stands_beside_mergers_are_refused(name):
    check_names(["magmax", "mine"], ["tuned"])
    with pytest.raises(ValueError, match=re.escape(f"another name for a merger than '{name}'")):
        check_names(["magmax", name], ["tuned"])


def test_missing_requirements_are_named():
    check_requirements({"magmax": MagMax()}, score=False, losses=False, statistics=False)
    check_requirements({"soup": GreedySoup(), "fisher": Fisher()}, score=True, losses=True, statistics=True)
    with pytest.raises(ValueError, match="score= for merger 'soup'"):
        check_requirements({"soup": GreedySoup()}, score=False, losses=False, statistics=True)
    with pytest.raises(ValueError, match=r"statistics= for merger 'fisher', which requires \['fisher'\]"):
        check_requirements({"fisher": Fisher()}, score=True, losses=False, statistics=False)
