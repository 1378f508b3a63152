"""Choose the settings of mergers on a run's validation images; test images are not used."""

from collections.abc import Callable, Mapping, Sequence

from clmerge.deploy.naming import check_settings
from clmerge.merging import Merger
from clmerge.runs.comparison.refold import sweep
from clmerge.runs.comparison.row_cache import CachedRow, RowCache
from clmerge.runs.stored_run import StoredRun
from clmerge.search.grid import Values, grids, points, with_values
from clmerge.search.scale_rule import ScaleRule
from clmerge.search.search import Search, mean_accuracy


def plan_searches(
    run: StoredRun, mergers: Mapping[str, Merger], scale: str | None, assignments: Sequence[str]
) -> dict[str, Search]:
    """Return the searches by merger, checked before anything is computed.

    Args:
        run: The run whose task vectors are merged.
        mergers: Mergers by name.
        scale: Values of ``scale``, for every merger that has one.
        assignments: Values of other parameters, ``NAME.PARAMETER=VALUES``.

    Raises:
        ValueError: If the run has tasks without validation images, a parameter is unknown, or a merger refuses a value.
    """

    def check(name: str) -> Callable[[Merger], None]:
        return lambda candidate: check_settings({name: candidate}, run.base, len(run.tasks))

    found = {}
    for name, grid in grids(mergers, scale, assignments).items():
        if not run.has_validation:
            raise ValueError(
                f"expected validation images of every task to choose {', '.join(grid)} of {name!r} on, got a run of a "
                f"stream that holds none out ({run.folder.path}): train with stream.val_fraction above 0, or give the "
                "value in --mergers"
            )
        found[name] = Search(name, mergers[name], grid, check=check(name))
    return found


def search_all(run: StoredRun, searches: Sequence[Search], cache: RowCache, memory: int) -> None:
    """Try the grids of all mergers together, or the points of differential evolution for more than two parameters.

    Args:
        run: The run.
        searches: The searches.
        cache: Stores the rows, so that a search resumes after an interruption.
        memory: Bytes of accumulators and weights that are held at a time.
    """

    def evaluate(search: Search) -> Callable[[Sequence[Values]], None]:
        return lambda candidates: _try(run, {search: candidates}, cache, memory)

    grids = {search: points(search.grid) for search in searches if search.method == "grid"}
    if grids:
        _try(run, grids, cache, memory)
    for search in searches:
        if search.method != "grid":
            search.evolve(evaluate(search))


def _try(run: StoredRun, candidates: Mapping[Search, Sequence[Values]], cache: RowCache, memory: int) -> None:
    """Evaluate candidates on the validation images after the last task, in one pass if memory allows."""
    mergers = {
        f"{search.name} {i}": with_values(search.merger, values)
        for search, several in candidates.items()
        for i, values in enumerate(several)
    }
    what = f"settings of {', '.join(search.name for search in candidates)}"
    table = sweep(run, mergers, cache, split="val", last_only=True, memory=memory, what=what)
    for search, several in candidates.items():
        rows = [table[f"{search.name} {i}"][len(run.kept)] for i in range(len(several))]
        setting = "task_aware" if search.merger.task_views else run.evaluation
        search.keep(several, [run.counted(row[setting]) for row in rows])


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
