"""The short rules of docs/own_rule.md, one per base, against what they say they are."""

import gc
import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "own_rule.md"
SHAPES = {"matrix": (4, 5), "bias": (5,), "scalar": (), "empty": (0, 3)}


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    """The page's code as a module."""
    folder = tmp_path_factory.mktemp("rules")
    code = "\n\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S))
    (folder / "rules_of_the_page.py").write_text(code, encoding="utf-8")
    sys.path.insert(0, str(folder))
    yield importlib.import_module("rules_of_the_page")
    sys.path.remove(str(folder))
    del sys.modules["rules_of_the_page"]
    gc.collect()  # the registry forgets them


def vectors(num_tasks=4):
    generator = torch.Generator().manual_seed(0)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(num_tasks)]


def leading(taus):
    if taus.ndim != 3 or not taus.size:
        return taus.mean(axis=0)
    u, s, vh = np.linalg.svd(taus.sum(axis=0))
    return s[0] * np.outer(u[:, 0], vh[0])


def row_space(taus):
    if taus.ndim != 3 or not taus.size:
        return taus.mean(axis=0)
    grams = [tau.T @ tau for tau in taus]
    return sum(tau @ gram for tau, gram in zip(taus, grams, strict=True)) @ np.linalg.pinv(sum(grams))


REFERENCES = {
    "Signs": lambda taus: np.sign(taus.sum(axis=0)),
    "Recent": lambda taus: np.average(taus, axis=0, weights=[2.0**task for task in range(len(taus))]),
    "Midrange": lambda taus: (taus.max(axis=0) + taus.min(axis=0)) / 2,
    "LeadingDirection": leading,
    "RowSpace": row_space,
}


def merged(rule, taus, tasks):
    merger = rule()
    for task in tasks:
        merger.update(taus[task], task=task)
    return merger


def assert_is(merger, taus, reference):
    for name, tensor in merger.compute().items():
        expected = reference(np.stack([tau[name].double().numpy() for tau in taus]))
        np.testing.assert_allclose(tensor.double().numpy(), expected, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("rule", REFERENCES)
def test_a_short_rule_is_what_it_says(rules, rule):
    merger, taus = getattr(rules, rule)(), vectors()
    for count, tau in enumerate(taus, start=1):
        merger.update(tau)
        if rule != "RowSpace" or count > 1:  # the gram of one 4 x 5 matrix is singular
            assert_is(merger, taus[:count], REFERENCES[rule])


@pytest.mark.parametrize("rule", REFERENCES)
def test_a_short_rule_is_joined_saved_and_taken_out_of(rules, rule):
    rule, reference, taus = getattr(rules, rule), REFERENCES[rule], vectors()
    merger = merged(rule, taus, (0, 1))
    merger.merge_state(merged(rule, taus, (2, 3)))
    assert_is(merger, taus, reference)
    again = rule()
    again.load_state_dict(merger.state_dict())
    assert_is(again, taus, reference)
    if again.removable:
        again.downdate(taus[3], task=3)
        assert_is(again, taus[:3], reference)


def test_every_rule_of_the_page_is_looked_at(rules):
    from clmerge.merging import registered_mergers

    named = {name for name, rule in registered_mergers().items() if rule.__module__ == rules.__name__}
    assert named == set(REFERENCES)
