import pytest
import torch
from support.merger_cases import CASES
from support.references import score, statistics_of

from clmerge.merging import DARE, TIES, ByTask, MagMax, Pipeline, Scale, TaskArithmetic, TrimModel, TrimTensor
from clmerge.merging.finish.finisher import Finisher

SHAPES = {"layers.0.matrix": (4, 5), "layers.0.bias": (5,), "layers.1.matrix": (6, 5), "scalar": ()}
BY_PARAMETER = [label for label, case in CASES.items() if case.build().scope in ("entry", "parameter")]
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
    assert TIES().scope == "thresholds"
    assert TIES(trim="tensor").scope == "parameter"
    for label in ("GreedySoup", "PAINT"):
        assert CASES[label].build().scope == "model"
    for label in ("WiSEFT", "MagMax", "TaskArithmetic"):
        assert CASES[label].build().scope == "entry"
    for label in ("ModelStock", "RandomMix", "DARE"):
        assert CASES[label].build().scope == "parameter"


def test_composed_rules_are_as_wide_as_their_widest_part():
    assert Pipeline(MagMax(), sparsifier=TrimTensor(), finisher=Scale(2.0)).scope == "parameter"
    assert Pipeline(MagMax(), sparsifier=TrimModel()).scope == "thresholds"
    assert Pipeline(MagMax(), sparsifier=ByTask([TrimModel()])).scope == "model"
    assert Pipeline(TIES(), sparsifier=TrimModel()).scope == "model"
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

    class _Planned(TIES):
        name = "planned"  # until it is collected, it is a merger beside TIES

        def _plan(self, vector, step):
            return super()._plan(vector, step)

    assert _Normed().scope == "model"
    assert _Planned().scope == _Planned(trim="tensor").scope == "model"
    assert Pipeline(finisher=_ByDepth()).scope == "model"


@pytest.mark.parametrize("rule", [TIES(0.5), Pipeline(MagMax(), sparsifier=TrimModel(0.5))])
def test_known_thresholds_narrow_a_rule_down(rule):
    vectors = [{"w": torch.tensor([1.0, -5.0, 3.0])}, {"w": torch.tensor([2.0, 1.0, 1.0])}]
    for vector in vectors:
        rule.update(vector)
    assert rule.threshold_rank(3) == 2
    known = rule.with_thresholds({0: 3.0, 1: 1.0})
    assert known.scope in ("entry", "parameter")
    known.reset()
    for task, vector in enumerate(vectors):
        known.update_piece(vector, task)
    assert torch.equal(known.compute()["w"], rule.compute()["w"])


@pytest.mark.parametrize("part", [TaskArithmetic(), TIES(trim="tensor"), Pipeline(), TrimTensor()])
def test_only_a_part_with_thresholds_is_asked_for_them(part):
    with pytest.raises(TypeError, match=r"scope 'thresholds', got .* of scope '(entry|parameter)'"):
        part.threshold_rank(10)
    with pytest.raises(TypeError, match="scope 'thresholds'"):
        part.with_thresholds({})
