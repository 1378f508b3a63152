"""Compare mergers on one finished run: search settings, merge, evaluate, add references."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clmerge.deploy.naming import check_names
from clmerge.runs.comparison.diagnose import diagnose_run
from clmerge.runs.comparison.grid import grids
from clmerge.runs.comparison.ledger import Ledger, Row
from clmerge.runs.comparison.orders import order_sweep
from clmerge.runs.comparison.references import add_references, check_joint
from clmerge.runs.comparison.refold import check_mergers, sweep
from clmerge.runs.comparison.scale_rule import scale_rules
from clmerge.runs.comparison.search import Search, search_all
from clmerge.runs.comparison.stored_run import StoredRun
from clmerge.merging import Merger
from clmerge.names import tell
from clmerge.results.results import ENSEMBLE, EXPERT, JOINT, SETTINGS, TASK_ORACLE, ZERO_SHOT, Results

RULE = "scale-rule"


@dataclass
class Request:
    """The settings of a comparison.

    Args:
        mergers: Mergers by name.
        scale: Values of ``scale`` to choose from, for every merger that has one.
        grid: Values of other parameters, ``NAME.PARAMETER=VALUES``.
        scale_rule: Whether to also try a rule for the scale as a function of t.
        orders: Number of orders of the experts to merge in; 0 for the run's own only.
        orders_seed: Seed of the other orders.
        memory: Bytes of accumulators and merged weights that are held at a time.
        diagnose: Whether to compute diagnostics of task vectors, experts and merged models.
    """

    mergers: Mapping[str, Merger]
    scale: str | None = None
    grid: list[str] = field(default_factory=list)
    scale_rule: bool = False
    orders: int = 0
    orders_seed: int = 0
    memory: int = 2**32
    diagnose: bool = False


@dataclass
class Comparison:
    """The results of a comparison on one run.

    Attributes:
        run: The run.
        results: Accuracies of all models.
        settings: Merger and settings by model.
        bytes_kept: Bytes kept beside theta_0 after every task, by model.
        merge_seconds: Seconds per task, by merger.
        searches: The searches.
        orders: The order sweeps by merger; empty if not requested.
        diagnostics: The diagnostics document; None if not requested.
    """

    run: StoredRun
    results: Results
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    bytes_kept: dict[str, list[int]] = field(default_factory=dict)
    merge_seconds: dict[str, list[float]] = field(default_factory=dict)
    searches: list[dict[str, Any]] = field(default_factory=list)
    orders: dict[str, Any] = field(default_factory=dict)
    diagnostics: dict[str, Any] | None = None

    def add(self, name: str, merger: Merger, rows: list[Row], *, search: int | None) -> None:
        """Add a model that is a merger.

        Args:
            name: Its name.
            merger: The merger with its settings.
            rows: A row for every task.
            search: Position of the search that chose settings, if one did.
        """
        for row in rows:
            self.results.add_row(name, *(row[setting] for setting in SETTINGS))
        self.settings[name] = {
            "merger": type(merger).__name__,
            "init_args": merger.settings(),
            "run": self.run.name,
            "requires": sorted({*merger.requires, *(["score"] if merger.requires_score else [])}),
            "order_free": merger.order_free,
            "exact_online": merger.exact_online,
            "search": search,
        }
        shapes = self.run.shapes
        self.bytes_kept[name] = [merger.state_size(shapes, t) for t in range(1, len(rows) + 1)]
        self.merge_seconds[name] = [row["merge_seconds"] for row in rows]


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
    check_names(mergers)
    check_mergers(run, mergers)
    if joint is not None:
        check_joint(run, joint)
    grid = grids(mergers, request.scale, request.grid)
    for name, merger in mergers.items() if request.scale is not None else ():
        if "scale" in merger.ignored_by_views:
            tell(f"{name}: scale is not searched: its views for the tasks do not depend on it")
    return {name: Search(run, name, mergers[name], parameters) for name, parameters in grid.items()}


def compare_run(run: StoredRun, request: Request, ledger: Ledger, joint: StoredRun | None = None) -> Comparison:
    """Compare mergers on one run; rows in ``ledger`` are not computed again.

    Args:
        run: The run.
        request: The settings of the comparison.
        ledger: Stores the rows.
        joint: A run that was trained on all classes together, if there is one.

    Raises:
        ValueError: If the request is impossible for the run, or a setting is unknown.
    """
    mergers = dict(request.mergers)
    searches = check_request(run, request, joint)
    fitted = run.results
    blank = Results(fitted.tasks, classes=fitted.classes, samples=fitted.samples, evaluation=run.evaluation)
    found = Comparison(run, blank)
    search_all(list(searches.values()), ledger, request.memory)
    for name, search in searches.items():
        mergers[name] = search.build()
        found.searches.append(search.to_dict(name))
    table = sweep(run, mergers, ledger, memory=request.memory)
    for name, merger in mergers.items():
        position = list(searches).index(name) if name in searches else None
        found.add(name, merger, list(table[name].values()), search=position)
    if request.scale_rule:
        for name, (rule, rows) in scale_rules(list(searches.values()), ledger, request.memory).items():
            position = list(searches).index(name)
            found.searches[position]["rule"] = rule.to_dict()
            found.add(f"{name}_{RULE}", rule.at(len(rows)), rows, search=position)
    if request.orders:
        found.orders = order_sweep(
            run, mergers, request.orders, ledger, seed=request.orders_seed, memory=request.memory
        )
    add_references(found.results, run, ledger, joint)
    _count_references(found)
    if request.diagnose:
        found.diagnostics = diagnose_run(run, mergers)
    return found


def _count_references(found: Comparison) -> None:
    """Set the bytes that references keep: the weights of a deployed model, of every expert, or none."""
    weights = 4 * found.run.num_parameters
    num_tasks = len(found.run.tasks)
    grows = list(itertools.accumulate(found.run.bank.path(task).stat().st_size for task in range(num_tasks)))
    kept = {
        ZERO_SHOT: [0] * num_tasks,
        EXPERT: [weights] * num_tasks,
        TASK_ORACLE: grows,
        ENSEMBLE: grows,
        JOINT: [weights] * num_tasks,
    }
    found.bytes_kept |= {name: kept[name] for name in found.results.models if name in kept}
