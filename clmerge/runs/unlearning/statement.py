"""Write models without tasks, and a statement of what was taken out of them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clmerge.checkpoints.ledger import versions
from clmerge.deploy.describe import describe_merger
from clmerge.files import atomic_folder
from clmerge.results.model_facts import ModelFacts
from clmerge.results.model_record import to_json
from clmerge.results.results import HEAD
from clmerge.runs.image_classifier import facts_of
from clmerge.runs.stored_run import StoredRun
from clmerge.runs.unlearning.forget import Forgotten
from clmerge.runs.unlearning.request import Request
from clmerge.weights import save_tensors, write_json_atomic
from clmerge.weights.parametrization import folded
from clmerge.weights.swap import swapped

SCHEMA = 1
STATEMENT = "statement.json"
KEY = "clmerge.forgotten"  # in the metadata of a model's file, a JSON text


def statement(run: StoredRun, request: Request, models: Sequence[Forgotten]) -> dict[str, Any]:
    """Return the statement of what was forgotten, in JSON types.

    Args:
        run: The run.
        request: What was to be forgotten.
        models: What was done to every merged model.
    """
    found = {
        **_removed(run, request),
        "run": {"name": run.name, "identity": run.identity, "seed": run.seed},
        "versions": versions(),
        "evaluation": run.evaluation,
        "models": {
            one.name: {
                "file": f"{one.name}.safetensors",
                "rule": {"merger": type(one.merger).__name__, "init_args": one.merger.settings()},
                "how": one.how,
                **one.found,
            }
            for one in models
        },
        "remarks": _remarks(run),
    }
    document: dict[str, Any] = to_json(found)
    return document


def _removed(run: StoredRun, request: Request) -> dict[str, Any]:
    """Return what was removed and by which method; it is in the header of every model, too."""
    tasks = [run.tasks[task] for task in request.tasks]
    return {
        "schema": SCHEMA,
        "base": run.bank.base,
        "tasks": [
            {
                "index": task.index,
                "name": task.name,
                "classes": list(task.class_names),
                "vector_sha256": run.bank.metadata(task.index).get("sha256"),
            }
            for task in tasks
        ],
        "method": request.method,
        "settings": request.settings,
    }


def _remarks(run: StoredRun) -> list[str]:
    """Return what the models may still know of the tasks, and where it lies."""
    config, found = run.config, []
    start = config["learner"]["start_policy"]
    if start != "base":
        found.append(
            f"the run trained with start_policy={start}: the vectors of later tasks hold what was learned before them, "
            "so a merge without a task is not a model that was never trained on it; only start_policy=base is"
        )
    if config["data"]["replay"]:
        found.append("the run replayed images: later tasks were trained on images of earlier ones")
    if config["model"]["regularizers"]:
        found.append("the run trained with regularizers, by which later tasks depend on earlier ones")
    if not run.module.head.open_vocabulary:
        found.append("the head was trained and is not changed: it keeps the rows of all classes")
    if run.base_statistics:
        found.append(
            f"running statistics follow learner.buffers={config['learner']['buffers']}"
            + (": the latest were collected on the last task of the run" * (config["learner"]["buffers"] == "latest"))
        )
    found.append(f"the vectors of the tasks stay in the bank of the run, and its models in its folder: {run.name}")
    return found


def write(
    run: StoredRun, request: Request, models: Sequence[Forgotten], document: dict[str, Any], out: Path
) -> list[Path]:
    """Write the models and the statement into a folder, all at once; return the files.

    Args:
        run: The run, after its last task.
        request: What was to be forgotten.
        models: The models.
        document: The statement.
        out: A new or empty folder.

    Raises:
        ValueError: If the model files of the run are those of an older version of clmerge.
    """
    if (facts := facts_of(run.models)) is None:
        raise ValueError(
            f"expected model files that say what they are, got those of an older version of clmerge: remove "
            f"{run.folder.path / 'model'}, and `clmerge fit --resume {run.folder.path}` writes them again"
        )
    removed = json.dumps(_removed(run, request), sort_keys=True)
    run.enter(len(run.tasks) - 1)
    with atomic_folder(out, last=STATEMENT) as folder:
        for one in models:
            metadata = {"merger": repr(one.merger), KEY: removed, **_facts(run, request, one, facts).to_metadata()}
            with swapped(run.module, one.state), folded(run.module.backbone):
                weights = run.module.backbone.model.state_dict()
                save_tensors(folder / f"{one.name}.safetensors", weights, metadata=metadata)
        if not run.module.head.open_vocabulary:
            save_tensors(folder / f"{HEAD}.safetensors", run.module.head.state_dict(), metadata=facts.to_metadata())
        write_json_atomic(folder / STATEMENT, document)
    return sorted(path for path in out.iterdir() if path.is_file())


def _facts(run: StoredRun, request: Request, one: Forgotten, facts: ModelFacts) -> ModelFacts:
    """Return what the file of a model says about itself."""
    data = describe_merger(
        one.merger,
        vectors=run.folder.manifest.data,
        adaptation=run.adaptation,
        search=0 if request.chooses else None,
    )["data"]
    rule = {"merger": type(one.merger).__name__, "init_args": one.merger.settings()}
    tasks = facts.tasks
    if request.method == "downdate":
        tasks = [task for index, task in enumerate(tasks) if index not in request.tasks]
    return replace(facts, model=one.name, rule=rule, data=data, tasks=tasks)
