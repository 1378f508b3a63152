"""Resume a run from the last commit in its folder, after checking that settings and data are the same."""

from typing import Any

from clmerge.deploy.describe import describe_merger
from clmerge.results.results import EXPERT, ZERO_SHOT, Results
from clmerge.results.run_folder import RunFolder
from clmerge.runs.learner_parts import LearnerParts
from clmerge.streams.identity import check_stream, stream_identity


def restore(learner: LearnerParts, run: RunFolder) -> Results:
    """Load the committed state of a run into the learner; record stream and settings in a new run.

    Args:
        learner: The learner; its module is set up for the stream, in the state before the first task.
        run: The run folder.

    Returns:
        The results so far.

    Raises:
        ValueError: If seed, mergers, policies or data differ from those that the run began with.
    """
    tasks = learner.tasks
    fresh = learner.new_results(run.path.name)
    found = run.manifest
    results = Results.from_dict(found.results) if found.results else fresh
    if results.tasks != fresh.tasks or results.classes != fresh.classes:
        raise ValueError(f"expected the stream of {run.path} ({results.tasks}), got {fresh.tasks}")
    _check_settings(run, learner.settings())
    if found.stream:
        tested = found.evaluated > 0 or ZERO_SHOT in found.results.get("models", {})
        check_stream(learner.stream, found.stream, str(run.path), trained=run.tasks_begun, tested=tested)
    else:
        found.stream = stream_identity(learner.stream)
    describe_models(learner, results, vectors=found.data)
    results.options = found.options_by_task(len(tasks)) if found.options else []
    if found.trained:
        weights, accumulators = run.load_state()
        learner.data.task = found.trained - 1
        learner.module.resume_tasks([task.classes for task in tasks[: found.trained]])
        learner.module.load_state_dict(weights)
        learner.merge.load_accumulators(accumulators)
        learner.calibrated.load_state_dict(accumulators.get("calibration", {}))
        learner.routed.load_state_dict(accumulators.get("routing", {}))
    return results


def _check_settings(run: RunFolder, settings: dict[str, Any]) -> None:
    for name, expected in run.manifest.settings.items():
        if name in settings and settings[name] != expected:
            raise ValueError(
                f"expected {name} {expected!r}, with which {run.path} began, got {settings[name]!r}: one run has one "
                "setting of it; begin a new run"
            )
    run.manifest.settings = run.manifest.settings or settings


def describe_models(learner: LearnerParts, results: Results, *, vectors: str) -> None:
    """Describe the run's models in its results.

    Args:
        learner: The learner.
        results: The results of its run.
        vectors: Images that the task vectors were made with, beside the training of their tasks.
    """
    for name, merger in learner.mergers.items():
        results.describe(name, **describe_merger(merger, vectors=vectors, adaptation=learner.adaptation))
    for name, merger in learner.mergers.items():
        for kind, one in learner.calibrated.calibrations.items():
            own = describe_merger(merger, vectors=vectors, adaptation=learner.adaptation, calibration=one)
            results.describe(f"{name}+{kind}", **own)
    for name, routed in learner.routed.names(learner.mergers).items():
        for label, routing in routed.items():
            merger = learner.mergers[name]
            own = describe_merger(merger, vectors=vectors, adaptation=learner.adaptation, routing=routing)
            results.describe(label, **own)
    results.describe(EXPERT, kind="unmerged", data=vectors)
