"""Compare mergers on one finished run: search settings, merge, evaluate, add references."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from clmerge.deploy.calibration import CalibratedModels, Calibration
from clmerge.deploy.describe import describe_merger
from clmerge.deploy.naming import check_names
from clmerge.deploy.routing import Routing
from clmerge.deploy.routing.routed_models import routed_names
from clmerge.evaluation.probes import Probe, check_probes
from clmerge.merging import Merger
from clmerge.names import tell
from clmerge.results.results import SETTINGS, Results, Setting
from clmerge.runs.comparison.diagnose import diagnose_run
from clmerge.runs.comparison.orders import order_sweep
from clmerge.runs.comparison.probed import add_probes
from clmerge.runs.comparison.recalibrated import calibrated_names
from clmerge.runs.comparison.references import add_confusion, add_references, check_joint
from clmerge.runs.comparison.refold import check_mergers, sweep
from clmerge.runs.comparison.rerouted import routed_models, routed_sizes, with_references
from clmerge.runs.comparison.row_cache import CachedRow, RowCache
from clmerge.runs.comparison.searches import Sought, plan_searches, scale_rules, search_all
from clmerge.runs.comparison.soups import Soups
from clmerge.runs.stored_run import StoredRun
from clmerge.search.search import Search

RULE = "scale-rule"
FORGOTTEN = "forgotten"  # probe: accuracy on tasks that were left out


@dataclass
class Request:
    """The settings of a comparison.

    Args:
        mergers: Mergers by name.
        sought: What to search, how, and what for.
        scale_rule: Whether to also try a rule for the scale as a function of t.
        orders: Number of orders of the experts to merge in; 0 for the run's own only.
        orders_seed: Seed of the other orders.
        memory: Bytes of accumulators and merged weights that are held at a time.
        diagnose: Whether to compute diagnostics of task vectors, experts and merged models.
        calibrations: Calibrations of every merged model, with the settings that were chosen for it.
        routings: Routed models around every merged one; the oracle and the nearest centroid are added to them.
        soups: Collects the final models of the runs, to average them.
        probes: Probes of all models, and after the last task of the un-merged expert and the model before the first.
    """

    mergers: Mapping[str, Merger]
    sought: Sought = field(default_factory=Sought)
    scale_rule: bool = False
    orders: int = 0
    orders_seed: int = 0
    memory: int = 2**32
    diagnose: bool = False
    calibrations: Sequence[Calibration] = ()
    routings: Sequence[Routing] = ()
    soups: Soups | None = None
    probes: Sequence[Probe] = ()


def check_request(run: StoredRun, request: Request, joint: StoredRun | None = None) -> dict[str, Search]:
    """Check, before anything is computed, that a request is possible for a run; return the searches by merger.

    Args:
        run: The run.
        request: The settings of the comparison.
        joint: A run that was trained on all classes together, if there is one.

    Raises:
        ValueError: If it is impossible, a setting is unknown, or the joint run has other classes or another model.
    """
    mergers = dict(request.mergers)
    routings = with_references(request.routings)
    check_names(mergers, [one.name for one in (*request.calibrations, *routings)])
    if joint is not None:
        check_joint(run, joint)
    routed_models(run, routings).check(run.base)
    if request.calibrations and len(run.kept) < len(run.tasks):
        raise ValueError(
            "expected --calibrations, which keep data of all tasks of a run, or --without, got both: leave one out"
        )
    if request.diagnose and len(run.kept) < len(run.tasks):
        raise ValueError("expected --diagnose, which describes all task vectors of a run, or --without, got both")
    check_mergers(run, mergers)
    check_probes(request.probes, run.stream)
    CalibratedModels(request.calibrations, run.module, run.data, run.stream, seed=run.seed)  # refuses what cannot be
    if request.soups is not None:
        request.soups.check(run, mergers)
    searches = plan_searches(run, mergers, request.sought)
    for name, merger in mergers.items() if request.sought.scale is not None else ():
        if "scale" in merger.ignored_by_views:
            tell(f"{name}: scale is not searched: its views for the tasks do not depend on it")
    return searches


def check_alike(results: Mapping[str, Results]) -> None:
    """Refuse runs that cannot be compared with each other.

    Args:
        results: Results by the name of their run.

    Raises:
        ValueError: If they have different numbers of tasks, or different default readings of the logits.
    """
    if len({one.num_tasks for one in results.values()}) > 1:
        lengths = ", ".join(f"{name}: {one.num_tasks}" for name, one in results.items())
        raise ValueError(f"expected runs of as many tasks to compare, got {lengths}")
    if len({one.evaluation for one in results.values()}) > 1:
        read = ", ".join(f"{name}: {one.evaluation}" for name, one in results.items())
        raise ValueError(f"expected runs that go by the same accuracy, got {read}; choose one with --evaluation")


def compare_run(run: StoredRun, request: Request, cache: RowCache, joint: StoredRun | None = None) -> Results:
    """Compare mergers on one run; rows in the cache are not computed again.

    Args:
        run: The run.
        request: The settings of the comparison.
        cache: Stores the rows.
        joint: A run that was trained on all classes together, if there is one.

    Returns:
        The results of all mergers and of the references, with searches, orders and diagnostics.

    Raises:
        ValueError: If the request is impossible for the run, or a setting is unknown.
    """
    mergers = dict(request.mergers)
    searches = check_request(run, request, joint)
    results = run.new_results(run.name, run.kept)
    results.path = str(run.folder.path)
    search_all(run, list(searches.values()), cache, request.memory)
    for name, search in searches.items():
        mergers[name] = search.build()
        results.searches.append(search.to_dict(name))
        if not search.keeps_limits:
            tell(f"{name}: no point that was tried keeps the limits of --at-least; the one that misses least is taken")
    routings = with_references(request.routings)
    table = sweep(
        run,
        mergers,
        cache,
        memory=request.memory,
        calibrations=request.calibrations,
        routings=routings,
        probes=request.probes,
    )
    positions = {name: list(searches).index(name) if name in searches else None for name in mergers}
    for name, merger in mergers.items():
        _add(results, run, name, merger, list(table[name].values()), search=positions[name])
    for name, calibrated in calibrated_names(mergers, request.calibrations).items():
        for each, one in calibrated.items():
            rows = list(table[each].values())
            _add(results, run, each, mergers[name], rows, search=positions[name], calibration=one)
    sizes = routed_sizes(run, routings)
    for name, routed in routed_names(mergers, routings).items():
        for each, routing in routed.items():
            rows, own = list(table[each].values()), sizes[routing.name]
            _add(results, run, each, mergers[name], rows, search=positions[name], routing=routing, sizes=own)
    if any(merger.requires_gradient for merger in mergers.values()) or any(one.adapts for one in routings):
        results.bytes["adaptation"] = run.adaptation.nbytes(run.data, run.kept)
    if request.scale_rule:
        for name, (rule, rows) in scale_rules(run, list(searches.values()), cache, request.memory).items():
            position = list(searches).index(name)
            results.searches[position]["rule"] = rule.to_dict()
            _add(results, run, f"{name}_{RULE}", rule.at(len(rows)), rows, search=position)
    if request.orders:
        seed, memory = request.orders_seed, request.memory
        results.orders = {
            "seed": seed,
            "models": order_sweep(run, mergers, request.orders, cache, seed=seed, memory=memory),
        }
    if request.soups is not None:
        request.soups.add(run, mergers)
    add_references(results, run, cache, joint)
    add_probes(results, run, cache, table, request.probes)
    if request.diagnose:
        results.diagnostics = diagnose_run(run, mergers)
    return results


def _add(
    results: Results,
    run: StoredRun,
    name: str,
    merger: Merger,
    rows: list[CachedRow],
    *,
    search: int | None,
    calibration: Calibration | None = None,
    routing: Routing | None = None,
    sizes: Sequence[int] | None = None,
) -> None:
    """Add a merger's model, calibrated or routed or neither, with a row for every task."""
    told = describe_merger(
        merger,
        vectors=run.folder.manifest.data,
        adaptation=run.adaptation,
        search=search,
        calibration=calibration,
        routing=routing,
    )
    results.describe(name, **told)
    for task, row in enumerate(rows):
        size = merger.state_size(run.shapes, task + 1)
        size += 0 if calibration is None else calibration.nbytes(run.module, run.data, task)
        size += 0 if sizes is None else sizes[task]
        accuracies = (run.counted(row[setting]) for setting in SETTINGS)
        results.add_row(name, *accuracies, bytes_kept=size, merge_seconds=row["merge_seconds"])
        add_confusion(results, run, name, row)
    if (routed_right := rows[-1].get("routing_accuracy")) is not None:
        results.add_routing(name, run.counted(routed_right))
    if forgotten := [task for task in range(len(run.tasks)) if task not in run.kept]:
        reading: Setting = "task_aware" if merger.task_views else run.evaluation
        results.model(name).probes[FORGOTTEN] = {
            "values": {run.tasks[task].name: rows[-1][reading][task] for task in forgotten},
            "n": {run.tasks[task].name: len(run.stream.dataset(task, "test")) for task in forgotten},
        }
