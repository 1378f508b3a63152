"""What rules say they hold, before they hold anything, against what they hold on the shapes of a CLIP."""

from math import prod

import pytest
import torch
from support.merger_cases import CASES, own_rules
from support.references import gradients, score, statistics_of

from clmerge.models import OpenClip
from clmerge.statistics.collectors import gram_matrices

BACKBONE = OpenClip("nano")
# The image tower of the embedded CLIP, with one of its blocks, which are all alike.
TOWER = {
    name: tuple(parameter.shape)
    for name, parameter in BACKBONE.named_parameters()
    if name.startswith("model.visual.") and ("resblocks" not in name or "resblocks.0." in name)
}
LINEAR = gram_matrices(BACKBONE, [torch.randn(1, 3, 28, 28)], list(TOWER))


def statistics(task):
    """Statistics of every kind; Gram matrices of linear layers alone, as the collector gives them."""
    outputs = {name: torch.eye(prod(TOWER[name]) // len(gram)) for name, gram in LINEAR.items()}
    return statistics_of(task, TOWER) | {"gram": LINEAR, "output_gram": outputs}


def tensors_in(state):
    if isinstance(state, torch.Tensor):
        return [state]
    return [tensor for value in state.values() for tensor in tensors_in(value)] if isinstance(state, dict) else []


@pytest.mark.parametrize("label", [label for label, case in CASES.items() if "Adam" not in label])
def test_the_size_that_is_said_is_the_size_that_is_held(label):
    merger, claims = CASES[label].build(), CASES[label].build()
    for task in range(2):
        generator = torch.Generator().manual_seed(task)
        vector = {name: torch.randn(shape, generator=generator) for name, shape in TOWER.items()}
        given = {name: value for name, value in statistics(task).items() if name in merger.requires}
        merger.update(vector, task=task, score=score, gradients=gradients, statistics=given)
        held = sum(tensor.nbytes for tensor in tensors_in(merger.state_dict()))
        assert claims.state_size(TOWER, task + 1) == held


def test_every_rule_is_looked_at():
    assert {type(case.build()) for case in CASES.values()} == set(own_rules().values())
