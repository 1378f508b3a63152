import pytest
import torch
from support.references import Case, dropped, ties, total

from clmerge.merging import DARE, TIES, GreedySoup, MagMax, TaskArithmetic

CASES = {
    "DARE": Case(DARE, dropped(0.9, "probability", 0, total(0.3))),
    "DARE l1": Case(lambda: DARE(0.5, rescale="l1", seed=7, scale=1.0), dropped(0.5, "l1", 7, total(1.0))),
    "DARE TIES": Case(
        lambda: DARE(0.5, rescale="none", reducer=TIES(0.5, trim="tensor")),
        dropped(0.5, "none", 0, ties(0.5, "tensor", "mean", 1.0)),
    ),
}


def test_expectation_is_task_arithmetic():
    vectors = [{"w": torch.full((200_000,), value)} for value in (1.0, 3.0)]
    merger = DARE(drop_rate=0.9, scale=0.5)
    for vector in vectors:
        merger.update(vector)
    assert merger.compute()["w"].mean().item() == pytest.approx(2.0, rel=0.02)


def test_default_scale_is_that_of_task_arithmetic():
    drop_nothing = DARE(drop_rate=0.0)
    drop_nothing.update({"w": torch.ones(3)})
    reference = TaskArithmetic()
    reference.update({"w": torch.ones(3)})
    assert torch.equal(drop_nothing.compute()["w"], reference.compute()["w"])


def test_the_reducer_decides_what_the_rule_can_do():
    assert DARE(reducer=TIES()).order_free
    greedy = DARE(reducer=GreedySoup())
    assert not greedy.order_free
    assert not greedy.exact_online
    assert greedy.requires_score


def test_settings_rebuild_the_rule():
    assert DARE(0.5, scale=2.0).settings() == {
        "drop_rate": 0.5,
        "rescale": "probability",
        "seed": 0,
        "scale": 2.0,
        "reducer": None,
    }
    nested = DARE(reducer=MagMax(1.0)).settings()["reducer"]
    assert nested == {"class_path": "MagMax", "init_args": {"scale": 1.0}}
    assert DARE(0.5, reducer=MagMax()).label == "dare_drop_rate0.5_reducer-magmax"


def test_scale_and_reducer_exclude_each_other():
    with pytest.raises(ValueError, match="scale or reducer"):
        DARE(scale=1.0, reducer=MagMax())
