import pytest
import torch
from torch import nn

from clmerge.weights import select_parameters


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.text = nn.Linear(2, 2).requires_grad_(False)
        self.head = nn.Linear(2, 2)
        self.head.weight = self.visual[0].weight
        self.steps = nn.Parameter(torch.zeros(1, dtype=torch.long), requires_grad=False)


def names(**patterns):
    return list(select_parameters(Tower(), **patterns))


def test_default_is_everything_that_trains_and_shared_parameters_once():
    assert names() == ["visual.0.weight", "visual.0.bias", "visual.1.weight", "visual.1.bias", "head.bias"]


def test_patterns_choose_and_leave_out():
    assert names(include=["visual.*"], exclude=["*.bias"]) == ["visual.0.weight", "visual.1.weight"]
    assert names(include=["head.bias", "visual.1.bias"]) == ["visual.1.bias", "head.bias"]
    assert names(exclude=["text.*", "visual.1.*"]) == ["visual.0.weight", "visual.0.bias", "head.bias"]
    assert names(include="visual.1.*") == ["visual.1.weight", "visual.1.bias"]


def test_a_shared_parameter_is_matched_by_any_of_its_names():
    assert names(include=["head.*"]) == ["visual.0.weight", "head.bias"]
    assert names(exclude=["head.*"]) == ["visual.0.bias", "visual.1.weight", "visual.1.bias"]


def test_the_parameters_themselves_are_returned():
    tower = Tower()
    assert select_parameters(tower)["head.bias"] is tower.head.bias


def test_names_do_not_show_that_the_module_is_compiled():
    wrapper = nn.Module()
    wrapper.add_module("_orig_mod", Tower())
    outer = nn.Module()
    outer.add_module("model", wrapper)
    assert list(select_parameters(outer, include=["model.head.bias"])) == ["model.head.bias"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"include": ["visaul.*"]}, r"'visaul\.\*'; the nearest names are .*'visual\.\*'"),
        ({"include": ["visual.0.wieght"]}, r"'visual\.0\.weight'"),
        ({"include": ["visual"]}, r"did you mean 'visual\.\*'"),
        ({"exclude": ["haed.*"]}, r"'head\.\*'"),
        ({"include": ["text.*"]}, "matches only frozen"),
        ({"exclude": ["*"]}, "at least one trainable parameter to merge in Tower"),
    ],
)
def test_patterns_that_select_nothing_are_errors(patterns, message):
    with pytest.raises(ValueError, match=message):
        names(**patterns)


def test_a_module_without_parameters_is_an_error():
    with pytest.raises(ValueError, match="got none"):
        select_parameters(nn.Identity())
    with pytest.raises(ValueError, match="no parameters"):
        select_parameters(nn.Identity(), include=["x"])
