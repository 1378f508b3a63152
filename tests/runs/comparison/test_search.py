import itertools
import sys
from types import SimpleNamespace

import pytest

from clmerge.merging import DELLA, TIES, MagMax, TaskArithmetic
from clmerge.merging.strategies.goal import Goal
from clmerge.runs.comparison import searches
from clmerge.runs.comparison.searches import Sought, plan_searches, scale_rules, search_all
from clmerge.search.scale_rule import ScaleRule, fit_rule
from clmerge.search.search import Search

NUM_TASKS = 3


@pytest.fixture
def passes(monkeypatch):
    """Stand a known function of the settings in for merging and evaluating; record what every pass evaluates."""
    seen = []

    def sweep(run, mergers, ledger, *, order=None, split="test", last_only=False, memory, what):
        order = range(NUM_TASKS) if order is None else order
        seen.append((split, {name: merger.settings() for name, merger in mergers.items()}, list(order)))
        counts = [len(order)] if last_only else range(1, len(order) + 1)
        return {name: {t: {"task_agnostic": quality(merger, t)} for t in counts} for name, merger in mergers.items()}

    def quality(merger, t):
        """Best at scale 1/t, and at the other values below."""
        settings = merger.settings()
        best = {"scale": 1 / t, "density": 0.3, "drop_rate": 0.3, "window": 0.06}
        loss = sum(abs(settings[name] - value) for name, value in best.items() if name in settings)
        return [1 - loss / 10] * NUM_TASKS

    monkeypatch.setattr(searches, "sweep", sweep)
    return seen


RUN = SimpleNamespace(
    has_validation=True,
    base={},
    tasks=[SimpleNamespace(name=f"task {t}") for t in range(NUM_TASKS)],
    stream=SimpleNamespace(dataset=lambda task, split: [0] * 50),
    kept=list(range(NUM_TASKS)),
    counted=list,
    name="run",
    evaluation="task_agnostic",
    folder=SimpleNamespace(path="run"),
)


def search_of(name, merger, grid, **options):
    return Search(name, merger, grid, check=lambda candidate: None, goal=Goal([1.0] * NUM_TASKS), **options)


def test_grids_of_all_mergers_go_together_over_validation_images_only(passes):
    grid = {"scale": [0.1, 0.3, 0.5]}
    several = [search_of("magmax", MagMax(), grid), search_of("ties", TIES(), {**grid, "density": [0.1, 0.3]})]
    search_all(RUN, several, None, 0)
    assert [split for split, _, _ in passes] == ["val"]
    assert len(passes[0][1]) == 3 + 6
    assert several[0].chosen == {"scale": 0.3}
    assert several[1].chosen == {"scale": 0.3, "density": 0.3}
    assert several[1].build().settings() == {**TIES().settings(), "scale": 0.3, "density": 0.3}
    document = several[1].to_dict("ties")
    assert (document["method"], len(document["points"]), document["chosen"]) == ("grid", 6, several[1].chosen)
    assert document["score"] == pytest.approx(1 - abs(0.3 - 1 / 3) / 10)


def test_more_than_two_parameters_are_searched_by_evolution_on_the_grid(passes):
    tenths = [round(0.1 * i, 1) for i in range(1, 10)]
    grid = {"scale": tenths, "drop_rate": tenths, "window": [0.02, 0.04, 0.06, 0.08]}
    found = search_of("della", DELLA(), grid)
    search_all(RUN, [found], None, 0)
    assert found.method == "differential_evolution"
    everything = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    tried = [values for values, _ in found.tried]
    assert all(values in everything for values in tried)
    assert len(tried) < len(everything) / 2, "fewer than the whole grid"
    assert len(tried) == len({tuple(values.values()) for values in tried}), "no point twice"
    scores = sorted((sum(accuracies) for _, accuracies in found.tried), reverse=True)
    assert found.chosen["drop_rate"] == pytest.approx(0.3, abs=0.11)
    assert found.chosen["scale"] == pytest.approx(1 / 3, abs=0.11)
    assert max(scores) >= NUM_TASKS * (1 - 0.3 / 10)
    assert len(passes) <= 7, "a generation is one pass"


def test_the_first_of_equals_is_chosen_and_points_count_once():
    found = search_of("magmax", MagMax(), {"scale": [1, 2]})
    found.keep([{"scale": 1}, {"scale": 2}], [[0.5] * NUM_TASKS] * 2)
    found.keep([{"scale": 1}], [[0.5] * NUM_TASKS])
    assert found.chosen == {"scale": 1}
    assert len(found.tried) == 2


def test_settings_that_a_merger_refuses_are_named_before_anything_is_tried():
    with pytest.raises(ValueError, match=r"'della' can have, got {'drop_rate': 0.1, 'window': 0.5}"):
        search_of("della", DELLA(), {"drop_rate": [0.5, 0.1], "window": [0.5]})


def test_a_run_without_validation_images_is_refused():
    run = SimpleNamespace(**{**vars(RUN), "has_validation": False})
    with pytest.raises(ValueError, match="val_fraction above 0"):
        plan_searches(run, {"magmax": MagMax()}, Sought(scale="1"))


def test_a_rule_uses_earlier_tasks_only(passes):
    """The best scale of the stand-in is 1/t, so the rule of two earlier tasks predicts the third."""
    one = search_of("sum", TaskArithmetic(scale=0.9), {"scale": [0.25, 1 / 3, 0.5, 1.0]})
    search_all(RUN, [one], None, 0)
    passes.clear()
    rule, rows = scale_rules(RUN, [one], None, 0)["sum"]
    assert rule.best == [1.0, 0.5, 1 / 3]
    assert rule.used == pytest.approx([0.9, 1.0, 1 / 3])
    assert len(rows) == NUM_TASKS
    tested = [(settings["sum"]["scale"], order) for split, settings, order in passes if split == "test"]
    assert [order for _, order in tested] == [[0], [0, 1], [0, 1, 2]]
    assert [scale for scale, _ in tested] == pytest.approx(rule.used)


def test_a_rule_stays_within_what_was_tried():
    rule = ScaleRule(TaskArithmetic(scale=1.0), [0.4, 1.0], [1.0, 0.4, 0.4])
    assert rule.used == [1.0, 1.0, 0.4]
    assert fit_rule([0.5]) == (0.5, 0.0)


def test_a_rule_needs_positive_scales(passes):
    one = search_of("sum", TaskArithmetic(), {"scale": [-1.0, 1.0]})
    search_all(RUN, [one], None, 0)
    with pytest.raises(ValueError, match="above 0"):
        scale_rules(RUN, [one], None, 0)


def test_a_point_that_does_not_fit_the_tasks_is_refused_before_anything_is_evaluated(passes):
    with pytest.raises(ValueError, match=r"merger 'task_arithmetic': expected one entry for each of the 3 tasks"):
        plan_searches(
            RUN,
            {"task_arithmetic": TaskArithmetic()},
            Sought(grid=["TaskArithmetic.weights=[1.0,1.0,1.0],[1.0,1.0]"]),
        )
    assert not passes


def searched(sought, merger, passes):
    (found,) = plan_searches(RUN, {"own": merger}, sought).values()
    search_all(RUN, [found], None, 0)
    return found


@pytest.mark.parametrize("method", ["cma_es", "gaussian", "quadratic"])
def test_strategies_find_numbers_that_are_not_listed(method, passes):
    found = searched(Sought(scale="0.0,1.0", method=method, budget=25), TaskArithmetic(), passes)
    assert found.chosen["scale"] == pytest.approx(1 / 3, abs=0.1)  # a kink, not a parabola
    assert len(found.tried) <= 25
    assert {split for split, *_ in passes} == {"val"}


def test_a_search_goes_on_from_the_rows_that_it_left(passes):
    """Told the same accuracies, a strategy asks for the same points."""
    sought = Sought(grid=["TaskArithmetic.weights[*]=0:1:0.5"], method="cma_es", budget=30)
    points = [searched(sought, TaskArithmetic(), passes).tried for _ in range(2)]
    assert points[0] == points[1]


def test_entries_of_a_list_are_searched_but_for_tasks_that_are_left_out(passes):
    run = SimpleNamespace(**{**vars(RUN), "kept": [0, 2]})
    (found,) = plan_searches(run, {"own": TaskArithmetic()}, Sought(grid=["TaskArithmetic.weights[*]=0,1"])).values()
    assert list(found.grid) == ["weights[0]", "weights[2]"]
    assert found.candidate({"weights[0]": 0.5, "weights[2]": 0}).weights == [0.5, 1.0, 0]
    assert found.goal.weights == [1.0, 0.0, 1.0]


def test_all_strategies_ask_together(passes):
    sought = Sought(scale="0:1:0.1", grid=["DELLA.drop_rate=0.2,0.3", "DELLA.window=0.02,0.06"])
    found = plan_searches(RUN, {"della": DELLA(), "magmax": MagMax()}, sought)
    search_all(RUN, list(found.values()), None, 0)
    assert [search.method for search in found.values()] == ["differential_evolution", "grid"]
    assert len(passes) == 6
    assert {name.split()[0] for name in passes[0][1]} == {"della", "magmax"}


def test_preferences_and_limits_are_read_by_name_or_index():
    (found,) = plan_searches(
        RUN, {"m": MagMax()}, Sought(scale="1", preference=["task 1=-2", "0=1"], at_least=["task 2=0.95"])
    ).values()
    assert (found.goal.weights, found.goal.at_least) == ([1.0, -2.0, 0.0], {2: 0.95})
    for wrong in ("task 9=1", "0", "0=x", "0=nan"):
        with pytest.raises(ValueError, match=r"expected TASK=NUMBER in --preference.*0 \(task 0\), 1"):
            plan_searches(RUN, {"m": MagMax()}, Sought(scale="1", preference=[wrong]))
    with pytest.raises(ValueError, match="a task that counts"):
        plan_searches(RUN, {"m": MagMax()}, Sought(scale="1", preference=["0=0"]))


def test_a_limit_is_a_share_of_what_the_base_model_reaches(monkeypatch):
    def sweep(run, mergers, cache, **options):
        def row(merger):
            return [merger.scale, 1 - merger.scale**2, 0.5] if merger.scale else [0.1, 0.9, 0.5]

        return {name: {NUM_TASKS: {"task_agnostic": row(merger)}} for name, merger in mergers.items()}

    monkeypatch.setattr(searches, "sweep", sweep)
    sought = Sought(scale="0.1:0.9:0.1", preference=["0=1"], at_least=["1=0.8"])
    (found,) = plan_searches(RUN, {"m": TaskArithmetic()}, sought).values()
    search_all(RUN, [found], None, 0)
    assert found.goal.at_least[1] == pytest.approx(0.72)
    assert found.chosen == {"scale": 0.5}  # 0.9 would be best, but keeps 0.19 of what must be 0.72
    assert found.keeps_limits


def test_the_front_holds_what_no_other_point_beats():
    found = search_of("magmax", MagMax(), {"scale": [1, 2, 3]})
    found.keep([{"scale": each} for each in (1, 2, 3)], [[0.9, 0.1, 0.5], [0.5, 0.5, 0.4], [0.4, 0.5, 0.4]])
    assert found.to_dict("magmax")["front"] == [0, 1]


def test_a_library_that_is_missing_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ValueError, match=r"library cma for the search 'cma_es'.*clmerge\[search\]"):
        plan_searches(RUN, {"m": MagMax()}, Sought(scale="0,1", method="cma_es"))
