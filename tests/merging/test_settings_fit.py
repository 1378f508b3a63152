"""Settings that do not fit the stream or the parameters are refused before anything is merged."""

import pytest
from support.merger_cases import own_rules

from clmerge.merging import (
    DARE,
    TALL,
    TIES,
    TSVM,
    ByTask,
    Consensus,
    GroupScale,
    LayerScale,
    LiNeS,
    Pipeline,
    TaskArithmetic,
    TrimTensor,
    TunableMagMax,
    WeightedAverage,
)
from clmerge.settings import Configured

TWO_TASKS = {
    "TaskArithmetic": lambda: TaskArithmetic(weights=[1.0, 2.0]),
    "TIES": lambda: TIES(weights=[1.0, 2.0]),
    "WeightedAverage": lambda: WeightedAverage("given", weights=[0.5, 0.5]),
    "TunableMagMax": lambda: TunableMagMax([1.0, 2.0]),
    "TALL": lambda: TALL([0.2, 0.4]),
    "Consensus": lambda: Consensus(threshold=[0.2, 0.4]),
    "ByTask": lambda: Pipeline(sparsifier=ByTask([TrimTensor(), TrimTensor()])),
    "inside of another": lambda: DARE(reducer=Pipeline(TIES(weights=[1.0, 2.0]))),
}
SHAPES = {"visual.blocks.0.w": (3, 2), "visual.blocks.1.w": (3, 2), "visual.blocks.1.b": (3,)}


@pytest.mark.parametrize("rule", TWO_TASKS)
def test_fewer_entries_than_tasks(rule):
    merger = TWO_TASKS[rule]()
    merger.check_tasks(2)
    with pytest.raises(ValueError, match=r"each of the 3 tasks in \w+ of \w+, got 2: "):
        merger.check_tasks(3)


def test_every_rule_takes_any_number_of_tasks_by_default():
    for rule in own_rules().values():
        rule().check_tasks(1000)


def test_settings_by_task_are_constructor_arguments():
    pending, found = [Configured], set()
    while pending:
        pending += (children := pending.pop().__subclasses__())
        found |= {child for child in children if child.per_task}
    assert {"TaskArithmetic", "TIES", "WeightedAverage", "TunableMagMax", "TALL", "ByTask"} <= {
        c.__name__ for c in found
    }


@pytest.mark.parametrize(
    ("merger", "message"),
    [
        (TSVM(include=["text.*"]), r"got 'text\.\*'"),
        (DARE(reducer=TSVM(exclude=["text.*"])), r"got 'text\.\*'"),
        (Pipeline(finisher=GroupScale({"text.*": 1.0})), r"got 'text\.\*'"),
        (Pipeline(finisher=LayerScale([1.0])), "each of the 2 blocks"),
        (Pipeline(finisher=LiNeS(num_blocks=1)), "num_blocks=1"),
        (Pipeline(finisher=LiNeS(block=r"layer(\d+)")), "numbered blocks"),
    ],
)
def test_patterns_that_match_nothing(merger, message):
    with pytest.raises(ValueError, match=message):
        merger.check_names(SHAPES)
    for good in (TSVM(include=["visual.*"]), Pipeline(finisher=LayerScale([1.0, 2.0])), Pipeline(finisher=LiNeS())):
        good.check_names(SHAPES)
