import pytest
import torch
from support.merger_cases import CASES
from support.references import score, statistics_of

from clmerge.merging import DARE, TIES, MagMax, Pipeline, Scale, TaskArithmetic, TrimModel, TrimTensor
from clmerge.merging.finish.finisher import Finisher

SHAPES = {"layers.0.matrix": (4, 5), "layers.0.bias": (5,), "layers.1.matrix": (6, 5), "scalar": ()}
BY_PARAMETER = [label for label, case in CASES.items() if case.build().scope != "model"]
BY_ENTRY = [label for label, case in CASES.items() if case.build().scope == "entry" and not case.build().requires]


@pytest.mark.parametrize("label", BY_PARAMETER)
def test_one_parameter_at_a_time_gives_the_same_bits(label):
    generator = torch.Generator().manual_seed(0)
    vectors = [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(4)]
    whole, single = CASES[label].build(), CASES[label].build()
    for task, vector in enumerate(vectors):
        whole.update(vector, task=task, score=score, statistics=statistics_of(task, SHAPES))
    expected = whole.compute()
    for name in SHAPES:
        single.reset()
        for task, vector in enumerate(vectors):
            statistics = statistics_of(task, SHAPES)
            own = {
                key: {name: value[name]}
                for key, value in statistics.items()
                if isinstance(value, dict) and name in value
            }
            numbers = {key: value for key, value in statistics.items() if not isinstance(value, dict)}
            single.update({name: vector[name]}, task=task, score=score, statistics=own | numbers)
        assert torch.equal(single.compute()[name], expected[name]), name


@pytest.mark.parametrize("label", BY_ENTRY)
def test_one_entry_at_a_time_gives_the_same_bits(label):
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(9, generator=generator) for _ in range(4)]
    whole, single = CASES[label].build(), CASES[label].build()
    for task, vector in enumerate(vectors):
        whole.update({"w": vector}, task=task)
    for entry in range(9):
        single.reset()
        for task, vector in enumerate(vectors):
            single.update({"w": vector[entry : entry + 1]}, task=task)
        assert torch.equal(single.compute()["w"], whole.compute()["w"][entry : entry + 1])


def test_rules_that_look_at_the_whole_model_say_so():
    assert TIES().scope == "model"
    assert TIES(trim="tensor").scope == "parameter"
    for label in ("GreedySoup", "PAINT"):
        assert CASES[label].build().scope == "model"
    for label in ("WiSEFT", "MagMax", "TaskArithmetic"):
        assert CASES[label].build().scope == "entry"
    for label in ("ModelStock", "RandomMix", "DARE"):
        assert CASES[label].build().scope == "parameter"


def test_composed_rules_are_as_wide_as_their_widest_part():
    assert Pipeline(MagMax(), sparsifier=TrimTensor(), finisher=Scale(2.0)).scope == "parameter"
    assert Pipeline(MagMax(), sparsifier=TrimModel()).scope == "model"
    assert Pipeline(TIES()).scope == "model"
    assert DARE(reducer=TIES()).scope == "model"


def test_a_new_rule_that_does_not_say_is_taken_for_model_wide():
    class _Normed(TaskArithmetic):
        name = "normed"

        def _overview(self):
            return 1.0

    class _ByDepth(Finisher):
        def finish(self, vector):
            return vector

    assert _Normed().scope == "model"
    assert Pipeline(finisher=_ByDepth()).scope == "model"
