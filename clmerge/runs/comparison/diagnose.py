"""Compute diagnostics of a stored run's task vectors, experts and merged models."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clmerge.evaluation.diagnostics import diagnose
from clmerge.merging import Merger
from clmerge.names import tell
from clmerge.runs.comparison.refold import Refold
from clmerge.runs.stored_run import StoredRun
from clmerge.weights import State


def diagnose_run(run: StoredRun, mergers: Mapping[str, Merger]) -> dict[str, Any]:
    """Diagnose a run whose tasks are all merged.

    All models have the head and the running statistics that the run had after its last task.

    Args:
        run: The run.
        mergers: Mergers by name, with the chosen settings.

    Returns:
        The diagnostics document (docs/diagnostics.md).
    """
    refold = Refold(run, mergers)
    for task in range(len(run.tasks)):
        refold.fold(task)
    run.enter(len(run.tasks) - 1)
    merge = refold.merge

    def weights(vector: State) -> dict[str, Tensor]:
        return merge.weights_with(vector, run.module)

    merged = {name: merge.merged_vector(name) for name in mergers}
    return diagnose(
        run.module,
        weights,
        run.bank,
        merged,
        run.data,
        setting=run.evaluation,
        seed=run.seed,
        progress=_tell(run.name),
    )


def _tell(name: str) -> Any:
    return lambda message: tell(f"{name}: {message}")
