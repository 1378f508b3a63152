"""Choose the settings of mergers on a run's validation images; test images are not used."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clmerge.deploy.naming import check_settings
from clmerge.merging import Merger, TaskArithmetic
from clmerge.merging.strategies.goal import Goal
from clmerge.runs.comparison.refold import sweep
from clmerge.runs.comparison.row_cache import CachedRow, RowCache
from clmerge.runs.stored_run import StoredRun
from clmerge.search.grid import Values, grids, with_values
from clmerge.search.scale_rule import ScaleRule
from clmerge.search.search import Search, mean_accuracy

THETA_0 = "theta_0"


@dataclass(frozen=True)
class Sought:
    """What searches try, how, and what for.

    Attributes:
        scale: Values of ``scale``, for every merger that has one.
        grid: Values of other parameters, ``NAME.PARAMETER=VALUES``.
        method: Name of the strategy; None: the grid, or differential evolution for more than two parameters.
        budget: How many points the strategy may ask for; None: its own choice.
        preference: ``TASK=WEIGHT``: how much each task counts, by name or index; a task that is not named does not.
            None given: all that are merged count the same.
        at_least: ``TASK=SHARE``: least accuracy, as a share of theta_0's on the same validation images.
    """

    scale: str | None = None
    grid: Sequence[str] = ()
    method: str | None = None
    budget: int | None = None
    preference: Sequence[str] = ()
    at_least: Sequence[str] = ()


def plan_searches(run: StoredRun, mergers: Mapping[str, Merger], sought: Sought) -> dict[str, Search]:
    """Return the searches by merger, checked before anything is computed.

    The limits of ``at_least`` are shares of 1 until :func:`search_all` has measured theta_0.

    Args:
        run: The run whose task vectors are merged.
        mergers: Mergers by name.
        sought: What to search.

    Raises:
        ValueError: If the run has tasks without validation images, a parameter is unknown, a merger refuses a value, or
            a library is missing.
    """

    def check(name: str) -> Callable[[Merger], None]:
        return lambda candidate: check_settings({name: candidate}, run.base, len(run.tasks))

    goal = _goal(run, sought)
    mergers = {name: _with_lists(merger, sought.grid, len(run.tasks)) for name, merger in mergers.items()}
    found = {}
    for name, grid in grids(mergers, sought.scale, sought.grid).items():
        if not run.has_validation:
            raise ValueError(
                f"expected validation images of every task to choose {', '.join(grid)} of {name!r} on, got a run of a "
                f"stream that holds none out ({run.folder.path}): train with stream.val_fraction above 0, or give the "
                "value in --mergers"
            )
        found[name] = Search(
            name,
            mergers[name],
            _of_kept(mergers[name], grid, run),
            check=check(name),
            goal=goal,
            method=sought.method,
            budget=sought.budget,
            images=min(len(run.stream.dataset(task, "val")) for task in goal.counted),
            shown=run.kept,
        )
    return found


def _goal(run: StoredRun, sought: Sought) -> Goal:
    """Return what the searches of a run maximise; limits are shares of theta_0's accuracies."""
    names = [task.name for task in run.tasks]
    weights = [float(task in run.kept) for task in range(len(names))]
    if sought.preference:
        given = _by_task(names, sought.preference, "--preference")
        weights = [given.get(task, 0.0) for task in range(len(names))]
        if not any(weights):
            raise ValueError("expected a task that counts in --preference, got weights of 0 only")
    return Goal(weights, _by_task(names, sought.at_least, "--at-least"))


def _by_task(names: Sequence[str], assignments: Sequence[str], option: str) -> dict[int, float]:
    """Return numbers by task index, from ``TASK=NUMBER``."""
    found = {}
    for assignment in assignments:
        word, _, text = assignment.rpartition("=")
        tasks = [i for i, name in enumerate(names) if word == name] or [i for i in range(len(names)) if word == str(i)]
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if len(tasks) != 1 or not math.isfinite(number):
            known = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
            raise ValueError(f"expected TASK=NUMBER in {option}, where a task is one of {known}, got {assignment!r}")
        found[tasks[0]] = number
    return found


def _with_lists(merger: Merger, grid: Sequence[str], num_tasks: int) -> Merger:
    """Return a merger with a list of ones for every setting per task whose entries are searched but which has none."""
    lists = {
        name: [1.0] * num_tasks
        for name in merger.per_task
        if getattr(merger, name) is None and any(f".{name}[" in assignment for assignment in grid)
    }
    return with_values(merger, lists) if lists else merger


def _of_kept(merger: Merger, grid: Mapping[str, list[Any]], run: StoredRun) -> dict[str, list[Any]]:
    """Leave out the entries, of settings per task, of tasks that are not merged: the result does not depend on them."""
    left_out = {f"{name}[{task}]" for name in merger.per_task for task in range(len(run.tasks)) if task not in run.kept}
    return {path: values for path, values in grid.items() if path not in left_out}


def search_all(run: StoredRun, searches: Sequence[Search], cache: RowCache, memory: int) -> None:
    """Let all strategies ask, evaluate what they ask for together, and tell them, until none asks any more.

    Args:
        run: The run.
        searches: The searches.
        cache: Stores the rows, so that a search resumes after an interruption.
        memory: Bytes of accumulators and weights that are held at a time.
    """
    if any(search.goal.at_least for search in searches):
        base = _accuracies(run, {THETA_0: TaskArithmetic(scale=0.0)}, cache, memory, "model: theta_0")[THETA_0]
        for search in searches:
            search.limit_by(base[run.evaluation])
    while asked := {search: found for search in searches if (found := search.strategy.ask())}:
        for search, accuracies in _try(run, asked, cache, memory).items():
            search.keep(asked[search], accuracies)
            search.strategy.tell(accuracies)


def _try(
    run: StoredRun, candidates: Mapping[Search, Sequence[Values]], cache: RowCache, memory: int
) -> dict[Search, list[list[float]]]:
    """Return the accuracies of candidates on validation images after the last task, in one pass if memory allows."""
    mergers = {
        f"{search.name} {i}": search.candidate(values)
        for search, several in candidates.items()
        for i, values in enumerate(several)
    }
    rows = _accuracies(run, mergers, cache, memory, f"settings of {', '.join(s.name for s in candidates)}")
    return {
        search: [
            rows[f"{search.name} {i}"]["task_aware" if search.merger.task_views else run.evaluation]
            for i in range(len(several))
        ]
        for search, several in candidates.items()
    }


def _accuracies(
    run: StoredRun, mergers: Mapping[str, Merger], cache: RowCache, memory: int, what: str
) -> dict[str, CachedRow]:
    table = sweep(run, mergers, cache, split="val", last_only=True, memory=memory, what=what)
    return {name: table[name][len(run.kept)] for name in mergers}


def scale_rules(
    run: StoredRun, searches: Sequence[Search], cache: RowCache, memory: int
) -> dict[str, tuple[ScaleRule, list[CachedRow]]]:
    """Return a rule for every merger whose scale is searched, and its rows on the test images.

    The other values that a search has chosen are used.

    Args:
        run: The run.
        searches: Its finished searches.
        cache: Stores the rows.
        memory: Bytes of accumulators and weights that are held at a time.

    Raises:
        ValueError: If a scale is not positive.
    """
    scaled = [search for search in searches if "scale" in search.grid]
    candidates = {
        f"{search.name} {scale}": with_values(search.build(), {"scale": scale})
        for search in scaled
        for scale in search.grid["scale"]
    }
    if not candidates:
        return {}
    if wrong := [scale for search in scaled for scale in search.grid["scale"] if scale <= 0]:
        raise ValueError(f"expected scales above 0 for a rule in t, got {wrong[0]}")
    table = sweep(run, candidates, cache, split="val", memory=memory, what="models with one scale each")
    counts = range(1, len(run.kept) + 1)
    rules = {}
    for search in scaled:
        scales = search.grid["scale"]
        best = []
        for t in counts:
            rows_of = [table[f"{search.name} {scale}"][t][run.evaluation] for scale in scales]
            scores = [mean_accuracy(run.counted(row)[:t]) for row in rows_of]
            best.append(float(scales[scores.index(max(scores))]))
        merger = with_values(search.build(), {"scale": vars(search.merger)["scale"]})
        rules[search.name] = ScaleRule(merger, scales, best)
    rows: dict[str, list[CachedRow]] = {name: [] for name in rules}
    for t in counts:
        at = {name: rule.at(t) for name, rule in rules.items()}
        what = "models with the rule's scale"
        found = sweep(run, at, cache, order=run.kept[:t], last_only=True, memory=memory, what=what)
        for name in rules:
            rows[name].append(found[name][t])
    return {name: (rule, rows[name]) for name, rule in rules.items()}
