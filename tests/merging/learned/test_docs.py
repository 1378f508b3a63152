"""The code of docs/adaptive.md does what it says."""

import gc
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from support.learning import learn
from support.tiny import ForeignModule, toy_loader

PAGE = Path(__file__).parents[3] / "docs" / "adaptive.md"
SHAPES = {"blocks.0.weight": (4, 3), "blocks.1.weight": (2, 4), "norm": (2,)}


def blocks():
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture
def rule(tmp_path):
    (tmp_path / "rule_of_the_page.py").write_text(blocks()[0], encoding="utf-8")
    sys.path.insert(0, str(tmp_path))
    yield importlib.import_module("rule_of_the_page").BlockWise
    sys.path.remove(str(tmp_path))
    del sys.modules["rule_of_the_page"]
    gc.collect()  # the registry forgets it


def test_a_rule_of_forty_lines_learns_a_coefficient_per_block(rule):
    generator = torch.Generator().manual_seed(0)
    vectors = [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
        for _ in range(3)
    ]
    images = torch.randn(9, 3, generator=generator, dtype=torch.float64)

    def entropy(vector, objective, tasks):
        assert objective.heads == "seen"
        hidden = torch.tanh(images @ vector["blocks.0.weight"].t())
        log_p = (hidden @ vector["blocks.1.weight"].t() + vector["norm"]).log_softmax(dim=1)
        return -(log_p.exp() * log_p).sum(dim=1).mean()

    merger = learn(rule(steps=30), vectors, entropy)
    assert {name: len(tensor) for name, tensor in merger.coefficients.items()} == {
        "block 0": 3,
        "block 1": 3,
        "others": 3,
    }
    assert all((tensor >= 0).all() for tensor in merger.coefficients.values())
    assert merger.losses["last"] < merger.losses["first"]
    assert len([line for line in blocks()[0].splitlines() if line.strip()]) <= 40


def test_another_project_learns_from_its_own_losses():
    namespace = {"held_out": [batch[0] for batch in toy_loader(0)]}
    exec(compile(blocks()[1], str(PAGE), "exec"), namespace)
    model, merge = ForeignModule(), namespace["merge"]
    merge.mergers["adamerging"].steps = 5
    merge.take_base(model)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        merge.fold({n: torch.randn(t.shape, generator=generator) for n, t in merge.base.items()}, _callable(model))
    assert merge.mergers["adamerging"].losses["last"] < merge.mergers["adamerging"].losses["first"]


def _callable(model):
    model.forward = model.net.forward
    return model
