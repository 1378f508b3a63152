"""Add what probes found about the models that are compared."""

from collections.abc import Mapping, Sequence

from clmerge.deploy.predictors import Merged
from clmerge.evaluation.probes import Probe
from clmerge.results.measured import Measured
from clmerge.results.results import EXPERT, ZERO_SHOT, Results
from clmerge.runs.comparison.refold import Table
from clmerge.runs.comparison.row_cache import CachedRow, RowCache, make_row
from clmerge.runs.stored_run import StoredRun
from clmerge.weights import apply_task_vector


def add_probes(results: Results, run: StoredRun, cache: RowCache, table: Table, probes: Sequence[Probe]) -> None:
    """Add the findings about every compared model, and about the last expert and the model before the first task.

    Args:
        results: The results, with the rows of all models.
        run: The run.
        cache: Stores the rows.
        table: The rows of the merged, calibrated and routed models.
        probes: The probes.
    """
    if not probes:
        return
    about = {probe.name: probe.described() for probe in probes}
    for model, rows in table.items():
        if model in results.models:
            _add(results, run, model, list(rows.values()), about)
    for model, row in _references(run, cache, probes).items():
        if model in results.models:
            _add(results, run, model, [row], about)


def _add(
    results: Results, run: StoredRun, model: str, rows: Sequence[CachedRow], about: Mapping[str, Mapping[str, object]]
) -> None:
    for probe, settings in about.items():
        found = [row.get("probes", {}).get(probe) for row in rows]
        if found[-1] is not None:
            curve = [float("nan") if one is None else one.value for one in found]
            results.add_probe(model, probe, _counted(run, found[-1]), curve=curve, **settings)


def _counted(run: StoredRun, found: Measured) -> Measured:
    """Return a finding on the tasks that count."""
    if not found.per_task:
        return found
    n = [found.n[task] for task in run.kept] if isinstance(found.n, list) else found.n
    return Measured(found.value, run.counted(found.per_task), found.values, n)


def _references(run: StoredRun, cache: RowCache, probes: Sequence[Probe]) -> dict[str, CachedRow]:
    last = len(run.tasks) - 1
    names = [EXPERT, *([ZERO_SHOT] if run.module.head.open_vocabulary else [])]
    keys = {name: cache.key(run.identity, f"{name}, probed by {[*probes]!r}", "test", [last]) for name in names}
    if not all(key in cache for key in keys.values()):
        run.enter(last)
        tau = run.bank[last]
        dense = {EXPERT: lambda: apply_task_vector(run.base, tau), ZERO_SHOT: lambda: run.base}
        zeros = {name: tensor * 0 for name, tensor in tau.items()}
        predictors = {EXPERT: Merged(run.expert(last)), ZERO_SHOT: Merged(run.weights_with(zeros))}
        rows = run.evaluate_again(
            f"{run.name}: {' and '.join(names)}, probes",
            {name: predictors[name] for name in names},
            last,
            probes=probes,
            weights={name: dense[name] for name in names},
        )
        cache.add({keys[name]: make_row(rows[name]) for name in names})
    return {name: cache[keys[name]] for name in names}
