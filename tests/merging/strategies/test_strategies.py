import numpy as np
import pytest
import torch

from clmerge.merging.strategies.goal import Goal, front
from clmerge.merging.strategies.methods import METHODS
from clmerge.merging.strategies.plain import simplex
from clmerge.merging.strategies.quadratic import Surrogate, num_terms
from clmerge.merging.strategies.space import Space
from clmerge.merging.strategies.strategy import Problem

WEIGHTS = {f"weights[{task}]": [round(0.1 * i, 1) for i in range(11)] for task in range(3)}
BEST = np.array([0.3, 0.6, 0.8])


def accuracies(point):
    """Every task is best at a value of its own, and suffers from the others' distances."""
    distance = np.abs(np.array(list(point.values())) - BEST)
    return [float(1 - distance[task] - 0.1 * distance.sum()) for task in range(3)]


def run(method, space=WEIGHTS, goal=None, tell=accuracies, **options):
    """Return the points that a strategy asks for, by generation."""
    strategy = METHODS[method](Problem(Space(space), goal or Goal([1, 1, 1]), **options))
    generations = []
    while asked := strategy.ask():
        generations.append(asked)
        strategy.tell([tell(point) for point in asked])
    return generations


def best(generations, goal=None):
    goal = goal or Goal([1, 1, 1])
    return max(goal.score(accuracies(point)) for asked in generations for point in asked)


@pytest.mark.parametrize(
    ("method", "at_least"), [("cma_es", 0.95), ("gaussian", 0.95), ("quadratic", 0.95), ("nsga", 0.85)]
)
def test_a_strategy_comes_near_the_best_within_its_budget(method, at_least):
    generations = run(method, budget=60)
    assert sum(map(len, generations)) <= 60
    assert best(generations) > at_least


@pytest.mark.parametrize("method", METHODS)
def test_a_strategy_is_deterministic_and_leaves_the_global_generators_alone(method):
    np.random.seed(3)
    torch.manual_seed(3)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    one = run(method, budget=24 if method not in ("grid", "differential_evolution") else None)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    np.random.seed(4)
    assert one == run(method, budget=24 if method not in ("grid", "differential_evolution") else None)


@pytest.mark.parametrize("method", ["cma_es", "gaussian"])
def test_a_strategy_begins_at_the_settings_of_the_merger(method):
    first = run(
        method,
        {"scale": [0.0, 2.0]},
        Goal([1]),
        lambda point: [-abs(point["scale"] - 1.7)],
        start={"scale": 1.6},
        budget=12,
    )
    assert np.mean([point["scale"] for point in first[0]]) == pytest.approx(1.6, abs=0.35)


def test_preferences_spread_over_the_simplex():
    (points,) = run("preferences", budget=15)
    assert len(points) == 15
    assert all(sum(point.values()) == pytest.approx(1, abs=1e-8) for point in points)
    assert {tuple(point.values()) for point in points} >= {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)}
    assert len(simplex(4, 3)) == 20
    with pytest.raises(ValueError, match="weights from 0 to 1"):
        run("preferences", {"scale": [0.5, 1.0]})


def test_nsga_finds_a_front_and_not_one_point():
    def opposed(point):
        x, y, _ = point.values()
        return [x - 0.2 * y, 1 - x - 0.2 * y, 0.5]

    asked = [point for each in run("nsga", goal=Goal([1, 1, 0]), tell=opposed, budget=60) for point in each]
    found = [asked[i] for i in front([opposed(point)[:2] for point in asked])]
    values = [point["weights[0]"] for point in found]
    assert min(values) < 0.3
    assert max(values) > 0.7


def test_a_surrogate_recovers_a_quadratic_from_as_many_points_as_unknowns():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(num_terms(3), 2))
    points = rng.uniform(size=(10, 3))
    squares = [points[:, i] * points[:, j] for i in range(3) for j in range(i, 3)]
    logits = np.column_stack([np.ones(10), points, *squares]) @ truth
    fitted = Surrogate(points, 1 / (1 + np.exp(-logits)), images=10**9)
    np.testing.assert_allclose(fitted.terms, truth, atol=1e-6)
    with pytest.raises(ValueError, match="10 points or more for 3 parameters, got 9"):
        Surrogate(points[:9], np.zeros((9, 2)))


def test_a_surrogate_of_one_task_has_the_worked_optimum():
    fitted = Surrogate(np.array([[0.0], [0.5], [1.0]]), np.array([[0.5], [0.8], [0.7]]))
    np.testing.assert_allclose(fitted.terms.ravel(), [0, 4.69788, -3.850582], atol=1e-5)
    top = -fitted.terms[1, 0] / 2 / fitted.terms[2, 0]
    assert top == pytest.approx(0.610022, abs=1e-6)
    assert fitted.predict(np.array([[top]]))[0, 0] == pytest.approx(0.807354, abs=1e-6)


def test_accuracies_of_nothing_and_of_all_are_kept_half_an_image_away():
    fitted = Surrogate(np.array([[0.0], [0.5], [1.0]]), np.array([[0.0], [0.5], [1.0]]), images=50)
    np.testing.assert_allclose(fitted.predict(np.array([[0.0], [1.0]])).ravel(), [0.01, 0.99])


def test_the_quadratic_search_needs_more_points_than_unknowns():
    with pytest.raises(ValueError, match="budget above 10 for a quadratic function of 3 parameters, got 8"):
        run("quadratic", budget=8)


def test_the_quadratic_search_tries_its_optimum_next():
    def one(point):
        return [1 / (1 + np.exp(-(4.69788 * point["scale"] - 3.850582 * point["scale"] ** 2)))]

    asked = run("quadratic", {"scale": [0.0, 1.0]}, Goal([1]), one, budget=8)
    assert asked[1][0]["scale"] == pytest.approx(0.610022, abs=1e-3)


def test_a_goal_prefers_what_keeps_the_limits_and_refuses_what_is_undefined():
    goal = Goal([1, -1, 0], at_least={2: 0.5})
    points = [[0.9, 0.1, 0.4], [0.6, 0.2, 0.5], [0.5, 0.2, 0.6]]
    assert max(points, key=goal.rank) == points[1]
    assert max([points[0], [0.9, 0.1, 0.45]], key=goal.rank)[2] == 0.45
    assert goal.gains(points[0]) == [0.9, -0.1]
    with pytest.raises(ValueError, match="task 0"):
        goal.score([float("nan"), 0.5, 0.5])
    assert Goal([1, 0]).score([0.5, float("nan")]) == 0.5


def test_values_between_and_listed():
    space = Space({"rank": [2, 8], "scale": [0.5, 1.0, 2.0], "merge": ["mean", "sum"]})
    unit = np.array([[0.4, 0.4, 0.4]])
    assert space.listed(unit) == [{"rank": 2, "scale": 1.0, "merge": "mean"}]
    assert space.between(unit) == [{"rank": 4, "scale": 1.1, "merge": "mean"}]
    np.testing.assert_allclose(space.unit({"rank": 5, "merge": "sum"}), [0.5, 0.5, 1.0])
    with pytest.raises(ValueError, match="values of scale"):
        Space({"scale": []})
