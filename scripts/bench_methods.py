"""Compare the methods of configs/methods on two real streams, over several seeds, and print the tables of the docs.

    python scripts/methods_data.py --data FOLDER --work WORK          # once: the streams and a pretrained ViT
    python scripts/bench_methods.py --work WORK                        # trains what is missing, prints the tables
    python scripts/bench_methods.py --work WORK --ways "LoRA, base" --rates 1e-3 3e-3
                                                  # instead: the validation accuracy of learning rates, on another seed

Mergers ride on common runs: one run for every way of training (tuning, regulariser, start policy), stream and seed.
Finished runs are kept under WORK/runs and not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # runs are parallel, not their matrix products
os.environ["WANDB_MODE"] = "offline"

import torch
import yaml

METHODS = Path(__file__).resolve().parent.parent / "configs" / "methods"
MERGERS = [
    "WeightAverage",
    {"class_path": "TaskArithmetic", "init_args": {"scale": 0.3}},
    "MagMax",
    "TIES",
    "TSVM",
    "OPCM",
]
FEW = MERGERS[:4]


@dataclass(frozen=True)
class Way:
    """A way of training, and what is read from its run.

    Attributes:
        method: Preset that says how it is trained.
        mergers: Mergers that ride on it; those of the preset if there are none here.
        policy: Start policy, where it is not the preset's.
        rate: Learning rate, where it is not that of full fine-tuning.
        expert: What the un-merged model's row is called, if it is shown.
    """

    method: str
    mergers: tuple[Any, ...] = ()
    policy: str | None = None
    rate: str = "full"
    expert: str | None = None


WAYS = {
    "full, base": Way("task_arithmetic", tuple(MERGERS)),
    "full, previous": Way("magmax", tuple(MERGERS), expert="sequential fine-tuning"),
    "full, merged": Way("coma", expert=None),
    "full, merged, Fisher": Way("cofima"),
    "full, best share": Way("paint"),
    "branches": Way("bam", expert="Branch-and-Merge"),
    "attention, base": Way("attention_only", tuple(FEW)),
    "linearized, base": Way("tangent_task_arithmetic", tuple(FEW), rate="linearized"),
    "linearized, previous": Way("tangent_task_arithmetic", tuple(FEW), policy="previous", rate="linearized"),
    "LoRA, base": Way("lora_task_arithmetic", tuple(FEW), rate="lora"),
    "LoRA, previous": Way("lora_task_arithmetic", tuple(FEW), policy="previous", rate="lora"),
    "linearized LoRA, base": Way("l_lora", tuple(FEW), rate="lora"),
    "LoRA, sum, tuned": Way("chitale_lora", rate="lora"),
    "ITA, base": Way("ita", tuple(FEW)),
    "SAM, base": Way("sam_merging", tuple(FEW)),
    "EWC": Way("ewc", expert="EWC"),
    "LwF": Way("lwf", expert="LwF"),
    "L2": Way("l2", expert="L2 to the start"),
    "replay": Way("replay", expert="experience replay, 500 images"),
    "joint": Way("joint", expert="joint training"),
    "class means": Way("simple_cil", expert="class means, frozen"),
}
TRIAL_SEED = 100  # of the runs that choose learning rates
EPOCHS = {"caltech": 4, "grey": 2}
# By validation accuracy, see --rates.
RATES = {
    "caltech": {"full": 3e-4, "linearized": 3e-4, "lora": 1e-3},
    "grey": {"full": 3e-4, "linearized": 3e-4, "lora": 1e-3},
}


def stream_config(name: str, work: Path) -> dict[str, Any]:
    """Return what all methods share on a stream: data, backbone, budget."""
    shared = {
        "data": {"batch_size": 32},
        "logging": {"wandb": False, "csv": False},
        "trainer": {
            "max_epochs": EPOCHS[name],
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
    }
    if name == "caltech":
        source = {"class_path": "ImageFolderSource", "init_args": {"root": str(work / "caltech" / "stream")}}
        checkpoint = str(work / "caltech" / "vit.safetensors")
        backbone = {"name": "test_vit3", "checkpoint": checkpoint, "image_size": 64}
        return shared | {
            "stream": {
                "class_path": "ClassIncremental",
                "init_args": {"source": source, "num_tasks": 10, "class_order": "random"},
            },
            "model": {
                "backbone": {"class_path": "Timm", "init_args": backbone},
                "head": "CosineHead",
                "loss_classes": "current",
            },
        }
    templates = {
        "mnist": ['a photo of the number: "{}".'],
        "fashion": ["a photo of a {}."],
        "kmnist": ["a photo of the kana {}."],
        "notmnist": ["a photo of the letter {}."],
        "pneumonia": ["a photo of {}."],
    }
    sources = [
        {"class_path": "NpzSource", "init_args": {"path": str(work / "grey" / f"{key}.npz"), "templates": value}}
        for key, value in templates.items()
    ]
    return shared | {
        "stream": {"class_path": "TaskIncremental", "init_args": {"sources": sources, "name": "grey"}},
        "model": {"backbone": "OpenClip", "loss_classes": "current"},
    }


def config_of(stream: str, way: str, seed: int, rate: float, work: Path) -> list[dict[str, Any]]:
    """Return the configurations of one run, the later ones over the earlier ones."""
    how = WAYS[way]
    preset = yaml.safe_load((METHODS / f"{how.method}.yaml").read_text())
    adam = {"class_path": "AdamW", "init_args": {"lr": rate, "weight_decay": 0.0}}
    sharp = {"class_path": "SAM", "init_args": {"base": adam}}
    last: dict[str, Any] = {"seed": seed, "model": {"optimizer": sharp if how.method == "sam_merging" else adam}}
    if how.mergers:
        last["mergers"] = list(how.mergers) if seed != TRIAL_SEED else ["WeightAverage"]
    if how.policy:
        last["learner"] = {"start_policy": how.policy}
    base = stream_config(stream, work)
    base["stream"]["init_args"]["seed"] = seed  # class order and validation cut
    return [base, preset, last]


def run_one(job: tuple[str, str, int, float, Path]) -> str:
    """Train one run in this process, if it is not there; return its folder."""
    from clmerge.cli.fit import main as fit

    stream, way, seed, rate, work = job
    name = f"{stream}-{re.sub('[^a-zA-Z]+', '_', way)}-{seed}-{rate:g}"
    folder = work / "runs" / name
    manifest = folder / "manifest.json"
    if manifest.is_file() and json.loads(manifest.read_text())["finished"]:
        return str(folder)
    os.environ.pop("CLMERGE_RUN_DIR", None)
    torch.set_num_threads(1)
    arguments = ["--resume", str(folder)]
    if not manifest.is_file():
        arguments = ["--run_dir", str(folder)]
        (work / "runs" / "configs").mkdir(parents=True, exist_ok=True)
        for part, config in enumerate(config_of(stream, way, seed, rate, work)):
            file = work / "runs" / "configs" / f"{name}-{part}.yaml"
            file.write_text(yaml.safe_dump(config))
            arguments += ["--config", str(file)]
    log = work / "runs" / f"{name}.log"
    with log.open("a") as sink, redirected(sink.fileno()):
        code = fit(arguments)
    if code:
        raise RuntimeError(f"expected a run that ends well, got exit code {code}; see {log}")
    return str(folder)


@contextlib.contextmanager
def redirected(descriptor: int) -> Iterator[None]:
    """Send what this process prints to a file."""
    saved = os.dup(1), os.dup(2)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, copy in enumerate(saved, start=1):
            os.dup2(copy, number)
            os.close(copy)


def run_all(jobs: list[tuple[str, str, int, float, Path]], workers: int) -> None:
    """Train what is missing, several runs side by side, and say how far it is."""
    import clmerge.cli.fit

    clmerge.cli.fit.build_parser()  # imports everything once, before the workers are forked
    with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=8) as pool:
        for count, folder in enumerate(pool.imap_unordered(run_one, jobs), start=1):
            print(f"{count}/{len(jobs)} {Path(folder).name}", file=sys.stderr, flush=True)


def record(folder: Path) -> dict[str, Any]:
    """Return the record of a run."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())["runs"][0]
    return found


def figures_of(folder: Path, model: str) -> dict[str, float]:
    """Read the figures of one model of one run."""
    results = record(folder)
    agnostic, aware = (results["models"][model][kind] for kind in ("task_agnostic", "task_aware"))
    return {
        "average accuracy": 100 * agnostic["average_accuracy"][-1],
        "task-aware": 100 * aware["average_accuracy"][-1],
        "learning accuracy": 100 * agnostic["learning_accuracy"],
        "forgetting": 100 * agnostic["forgetting"],
        "BWT": 100 * agnostic["backward_transfer"],
        "seconds": results["seconds"].get("train", 0.0),
        "MB kept": kept_bytes(folder, model) / 1e6,
    }


def oracle(folder: Path) -> dict[str, float]:
    """Return the figures of sending every image to the expert of its own task, from a run of independent experts."""
    matrices = record(folder)["models"]["expert"]
    agnostic, aware = (
        [matrices[kind]["R"][task][task] for task in range(len(matrices[kind]["R"]))]
        for kind in ("task_agnostic", "task_aware")
    )
    found = figures_of(folder, "expert")
    found |= {"average accuracy": 100 * sum(agnostic) / len(agnostic), "task-aware": 100 * sum(aware) / len(aware)}
    found |= {"forgetting": 0.0, "BWT": 0.0, "MB kept": sum(f.stat().st_size for f in folder.glob("bank/*")) / 1e6}
    return found


def kept_bytes(folder: Path, model: str) -> float:
    """Return the bytes that must be kept between tasks beside the model in training."""
    import clmerge.merging
    from clmerge.checkpoints.ledger import configured_from
    from clmerge.merging.checks import num_entries
    from clmerge.weights import TaskVectorBank

    config = yaml.safe_load((folder / "config.yaml").read_text())
    results = record(folder)
    kept = 0.0
    numbers = results["bytes"]
    if model not in ("expert", "zero_shot"):
        bank = TaskVectorBank(folder / "bank")
        shapes = {name: tuple(tensor.shape) for name, tensor in bank[0].items()}
        for plain in config["mergers"]:
            name = plain["class_path"].rsplit(".", 1)[-1]
            if getattr(clmerge.merging, name).name == model.partition("+")[0]:
                merger = configured_from({"class_path": name, "init_args": plain.get("init_args") or {}})
                kept += merger.state_size(shapes, len(bank)) + 4 * num_entries(shapes)  # and theta_0
    name, _, calibration = model.partition("+")
    prefix = "calibration." if calibration else ("regularizer.", "replay")
    return kept + sum(number for key, number in numbers.items() if key.startswith(prefix))


def mean_std(values: list[float]) -> str:
    """Return mean and standard deviation over seeds."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)):.1f}"


def table(stream: str, ways: list[str], seeds: list[int], work: Path) -> str:
    """Return one stream's table, a row per method, in Markdown."""
    rows: dict[str, list[dict[str, float]]] = {}
    for way in ways:
        for seed in seeds:
            rate = RATES[stream][WAYS[way].rate]
            folder = work / "runs" / f"{stream}-{re.sub('[^a-zA-Z]+', '_', way)}-{seed}-{rate:g}"
            models = record(folder)["models"]
            if way == "full, base":
                rows.setdefault("experts, told the task", []).append(oracle(folder))
            for model in models:
                expert = WAYS[way].expert
                if model == "zero_shot":
                    label = "zero-shot" if way == "full, base" else None
                elif model == "expert":
                    label = expert
                else:
                    label = None if expert and not WAYS[way].mergers else f"{way}: {model}"
                if label:
                    rows.setdefault(label, []).append(figures_of(folder, model))
    columns = list(next(iter(rows.values()))[0])
    lines = [f"| {stream} | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    best_first = sorted(rows.items(), key=lambda row: -sum(r["average accuracy"] for r in row[1]) / len(row[1]))
    for label, found in best_first:
        cells = [mean_std([row[column] for row in found]) for column in columns[:-2]]
        cells += [f"{sum(row[column] for row in found) / len(found):.1f}" for column in columns[-2:]]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def validation_accuracy(log: Path) -> float:
    """Return the mean over tasks of the validation accuracy after the task's last epoch, from a run's log."""
    last = {m[1]: float(m[2]) for m in re.finditer(r"task (\d+)/.*val/accuracy ([\d.]+)", log.read_text())}
    return sum(last.values()) / len(last)


def main() -> None:
    """Run, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of methods_data.py")
    parser.add_argument("--streams", nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rates", nargs="+", type=float, help="compare learning rates instead")
    options = parser.parse_args()
    if options.rates:
        jobs = [
            (s, w, TRIAL_SEED, r, options.work) for s in options.streams for w in options.ways for r in options.rates
        ]
        run_all(jobs, options.workers)
        for stream, way, seed, rate, work in jobs:
            log = work / "runs" / f"{stream}-{re.sub('[^a-zA-Z]+', '_', way)}-{seed}-{rate:g}.log"
            print(f"{stream:<8} {way:<18} {rate:g}: validation accuracy {validation_accuracy(log):.3f}")
        return
    jobs = [
        (stream, way, seed, RATES[stream][WAYS[way].rate], options.work)
        for seed in options.seeds
        for stream in options.streams
        for way in options.ways
    ]
    run_all(jobs, options.workers)
    for stream in options.streams:
        print(f"\n{table(stream, options.ways, options.seeds, options.work)}")


if __name__ == "__main__":
    main()
