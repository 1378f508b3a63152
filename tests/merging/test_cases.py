"""The cases of the rules are collected from their test files."""

import sys
from types import SimpleNamespace

import pytest
from support.merger_cases import CASES, RULES, imported, joined


@pytest.mark.parametrize("name", ["test_pipeline.py", "sign/test_ties.py"])
def test_a_test_file_is_one_module_for_pytest_and_for_the_cases(name):
    path = RULES / name
    modules = [module for module in list(sys.modules.values()) if getattr(module, "__file__", None) == str(path)]
    assert modules == [imported(path)]
    assert hasattr(modules[0], "@pytest_ar")  # pytest rewrote its assertions
    assert modules[0].CASES.items() <= CASES.items()


def test_a_label_of_two_cases_is_refused():
    one, other = (SimpleNamespace(__file__=name, CASES={"TIES": None}) for name in ("test_a.py", "test_b.py"))
    with pytest.raises(ValueError, match=r"'TIES' in test_a\.py and test_b\.py; rename one"):
        joined([one, other])
