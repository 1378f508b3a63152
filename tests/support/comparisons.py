"""Folders as ``clmerge compare`` leaves them: the document of docs/compare.md with made-up numbers."""

import json

from made_up import make_results
from support.run_folders import config_of, write_run

from clmerge.deploy.describe import describe_merger
from clmerge.merging import TIES, MagMax
from clmerge.results.results import SETTINGS, Results, to_document

MODELS = ("magmax", "ties", "opcm", "expert", "task_oracle")


def write_comparison(folder, *, num_runs=1, num_tasks=3, diagnostics=None):
    """Write runs ``run0`` ... and the folder ``compare`` beside them; return the document."""
    runs = []
    for index in range(num_runs):
        write_run(folder / f"run{index}", num_tasks=num_tasks, config=config_of(seed=index), shift=0.1 * index)
        results = _results(num_tasks, index)
        results.name, results.seed, results.group = f"run{index}", index, ""
        results.path = str(folder / f"run{index}")
        results.searches = [_search(model) for model in ("magmax", "ties")]
        results.orders = {"seed": 0, "models": {model: _order(model, num_tasks) for model in MODELS[:3]}}
        results.diagnostics = None if index else diagnostics
        results.describe("magmax", **describe_merger(MagMax(0.5 + index), search=0))
        results.describe("ties", **describe_merger(TIES(), search=1))
        runs.append(results)
    document = to_document(runs)
    (folder / "compare").mkdir()
    (folder / "compare" / "results.json").write_text(json.dumps(document))
    return document


def make_diagnostics(num_tasks=3, models=("base", "expert", "magmax")):
    """The document of docs/diagnostics.md with made-up numbers."""
    square = [[1.0 if s == t else None if s + t == 1 else 0.25 for s in range(num_tasks)] for t in range(num_tasks)]
    row = [0.5 + t for t in range(num_tasks)]
    layer = {"numel": 20, "norm": row, "cosine": square, "sign_conflict": square}
    matrix = {"shape": [4, 5], "effective_rank": row, "left_overlap": square, "right_overlap": square}
    ends = [("base", "expert"), ("expert", "magmax"), ("expert", "expert")]
    return {
        "schema": 1,
        "tasks": [f"task {t + 1}" for t in range(num_tasks)],
        "vectors": {
            "tasks": ["" for _ in row],
            "whole": layer,
            "layers": [{"name": f"visual.blocks.{index}", **layer} for index in range(2)],
            "rank": 8,
            "matrices": [{"name": "visual.blocks.0.a", "layer": "visual.blocks.0", **matrix}],
        },
        "models": {
            "setting": "task_agnostic",
            "split": "val",
            "images": [10 for _ in row],
            "positions": [0.0, 0.5, 1.0],
            "models": {
                name: {"loss": row, "error": row, "disagreement": [0.25] * num_tasks, "representation_bias": row}
                for name in models
            },
            "segments": [
                {
                    "from": start,
                    "to": end,
                    "tasks": [task],
                    "loss": [1, 2, 1],
                    "error": [0.25, 0.5 + 0.125 * task, 0.0],
                    "loss_barrier": 1.0,
                    "error_barrier": 0.25,
                }
                for start, end in ends
                for task in range(2)
            ],
            "disentanglement": {"scale": 1.0, "xi": square},
        },
    }


def _results(num_tasks, index):
    """Results whose accuracies fall with the index of the run."""
    one = make_results(num_tasks, MODELS)
    found = Results(one.tasks, classes=one.classes, samples=one.samples)
    found.set_zero_shot(*(one.matrix("zero_shot", setting)[0] * (1 - 0.1 * index) for setting in SETTINGS))
    for model in MODELS:
        for task, rows in enumerate(zip(*(one.matrix(model, setting) for setting in SETTINGS), strict=True)):
            merge_seconds = 0.01 * (task + 1) if model in MODELS[:3] else None
            scaled = (row * (1 - 0.1 * index) for row in rows)
            found.add_row(model, *scaled, bytes_kept=92 * (task + 1), merge_seconds=merge_seconds)
    return found


def _search(model):
    values = [{"scale": scale} for scale in (0.1, 0.5, 1.0)]
    if model == "ties":
        values = [{"scale": scale, "density": density} for scale in (0.5, 1.0) for density in (0.1, 0.2)]
    points = [{"values": each, "accuracy": [0.5], "score": 0.5 + 0.1 * index} for index, each in enumerate(values)]
    rule = {"chosen": [0.5, 0.4, 0.3], "used": [None, 0.5, 0.4], "a": 1.0, "b": -0.7}
    return {
        "model": model,
        "merger": model,
        "method": "grid",
        "split": "val",
        "parameters": {name: sorted({each[name] for each in values}) for name in values[0]},
        "points": points,
        "chosen": values[-1],
        "score": points[-1]["score"],
        "rule": rule if model == "magmax" else None,
    }


def _order(model, num_tasks):
    found = [0.8, 0.7, 0.9] if model == "opcm" else [0.8]
    one = {"accuracy": [[0.8] * num_tasks] * len(found), "average_accuracy": found, "mean": 0.8, "std": 0.1}
    return {"order_free": model != "opcm", "permutations": [], **dict.fromkeys(SETTINGS, one)}
