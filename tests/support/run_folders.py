"""Run folders with made-up results, as ``clmerge fit`` leaves them."""

import json
from pathlib import Path

import torch
import yaml
from made_up import answer, make_results

from clmerge.checkpoints.ledger import configured_from
from clmerge.deploy.describe import describe_merger
from clmerge.deploy.naming import name_mergers
from clmerge.report.rules import plain
from clmerge.results.results import to_document
from clmerge.weights import TaskVectorBank

MERGERS = [
    {"class_path": "clmerge.merging.MagMax", "init_args": {"scale": 0.5}},
    {"class_path": "clmerge.merging.TIES", "init_args": {"density": 0.1}},
]
SHAPES = {"a.weight": (4, 5), "b": (3,)}
MODELS = ("magmax", "ties", "expert")


def config_of(**changes):
    config = {
        "name": "made-up",
        "seed": 0,
        "stream": {"class_path": "clmerge.streams.ClassIncremental", "init_args": {"num_tasks": 3, "seed": 0}},
        "model": {"backbone": {"class_path": "clmerge.models.OpenClip", "init_args": {"name": "nano"}}},
        "mergers": MERGERS,
        "learner": {"start_policy": "previous"},
    }
    return config | changes


def write_run(
    folder: Path,
    *,
    num_tasks=3,
    finished=None,
    models=MODELS,
    config=None,
    shift=0.0,
    bank=True,
    names="task {}",
    answers=False,
):
    """Write a run; ``shift`` lowers all accuracies, so that repetitions differ. Return its record."""
    folder.mkdir(parents=True)
    results = make_results(num_tasks, models, finished=finished, names=names)
    if shift:
        lowered = type(results)(results.tasks, classes=results.classes, samples=results.samples)
        lowered.set_zero_shot(*(results.matrix("zero_shot", s)[0] - shift for s in ("task_agnostic", "task_aware")))
        for model in models:
            for rows in zip(*(results.matrix(model, s) for s in ("task_agnostic", "task_aware")), strict=True):
                lowered.add_row(model, *(row * (1 - shift) for row in rows))
        results = lowered
    if answers:
        answer(results, seed=0 if config is None else config["seed"])
    results.add_seconds("train", 12.5)
    results.name = folder.name
    config = config or config_of()
    results.seed = config.get("seed")
    _describe(results, config.get("mergers"), bank=bank)
    document = to_document([results])
    (folder / "results.json").write_text(json.dumps(document))
    (folder / "config.yaml").write_text("# made up\n" + yaml.safe_dump(config))
    done = finished is None or finished == num_tasks
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "finished": done}))
    if bank:
        for task in range(num_tasks if finished is None else finished):
            tau = {"a.weight": torch.full((4, 5), 0.1 * (task + 1)), "b": torch.ones(3)}
            TaskVectorBank(folder / "bank").append(task, tau, name=f"task {task}", base="b" * 64)
    return document["runs"][0]


def _describe(results, specifications, *, bank):
    """Describe the models that the configuration names, as ``clmerge fit`` does; none if a merger is unknown here."""
    try:
        mergers = [configured_from(plain(each)) for each in specifications or []]
    except ValueError:
        return
    for name, merger in name_mergers(mergers).items() if mergers else ():
        if name in results.models:
            results.describe(name, **describe_merger(merger))
            model = results.model(name)
            model.bytes_kept = (
                [merger.state_size(SHAPES, task + 1) for task in range(len(model))] if bank else [None] * len(model)
            )
