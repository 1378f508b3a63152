"""Compare data-free, learned, routed, calibrated and searched models on two streams over seeds; print the table.

python scripts/adaptive_table.py --data FOLDER --work WORK [--seeds 0 1 2] [--only print]

The streams are the quickstart's digits and five small grey data sets (--data as for scripts/methods_data.py), both with
the embedded nano CLIP and experts of one base model. Every comparison that is complete under WORK is not repeated. The
figures are written to WORK/adaptive.json; `--only print` reads them, or those of --results, and trains nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml
from table_runs import clmerge, spread

ROOT = Path(__file__).resolve().parent.parent
TA = "{class_path: TaskArithmetic, init_args: {scale: 0.3}}"
NUM_GREY = 1500  # training images of each set
BUFFER = ["--adaptation.source=buffer", "--adaptation.per_class=10"]
SURGERY = "{class_path: Surgery, init_args: {adaptation: {source: buffer, per_class: 10}%s}}"
# The learned rules take fewer and longer steps than is published (40 for 500), so that coefficients get about as far.
FEW = "steps: 40, lr: 0.01"


def listed(*rules: str) -> str:
    """Write a list of classes with settings as one option."""
    return f"[{', '.join(rules)}]"


def learned(name: str, settings: str) -> str:
    """Write a class with its settings."""
    return f"{{class_path: {name}, init_args: {{{settings}}}}}"


COMPARISONS: dict[str, list[str]] = {
    "free": [
        "--mergers",
        *("WeightAverage", "TaskArithmetic", "TIES", "TSVM", "WUDI", "IsoC", "IsoCTS", "RegMean", "LoRM", "NuFilt"),
        *("DCMerge", "WIDEN", "SVC", "EMR"),
    ],
    "rou": [
        "--mergers=WeightAverage",
        "--routings",
        *("Smile", "DAM", "GaussianPosterior", "TwinMerging", "Mingle"),
    ],
    "cal": [
        f"--mergers={listed(TA)}",
        f"--calibrations={listed('Repair', 'SampleTuning', SURGERY % '', SURGERY % ', routed: false')}",
    ],
    "tent": [f"--mergers={listed(TA)}", "--calibrations=Tent"],
    "unl": [
        *BUFFER,
        "--mergers="
        + listed(
            learned("AdaMerging", f"granularity: task, {FEW}"),
            learned("AdaMerging", FEW),
            learned("AdaMerging", f"elect: true, {FEW}"),
            learned("AdaMerging", f"latest_only: true, {FEW}"),
            learned("AdaMerging", f"objective: Agreement, {FEW}"),
            learned("ConcreteMask", "steps: 40, lr: 0.025"),
            learned("AdaRank", FEW),
        ),
    ],
    "lab": [
        *BUFFER,
        "--adaptation.labels=true",
        "--mergers="
        + listed(
            learned("ATLAS", FEW),
            learned("LearnedSoup", "steps: 40"),
            learned("HyperplaneSoup", "steps: 40"),
            "LMCocktail",
            learned("WeightSearch", "method: cma_es, budget: 15"),
            learned("WeightSearch", "method: quadratic"),
        ),
    ],
    "ro": [*BUFFER, "--adaptation.labels=true", f"--mergers={listed(TA)}", "--routings", "WEMoE", "PWEMoE"],
}


def config_of(stream: str, work: Path, data: Path) -> Path:
    """Return the configuration of a stream."""
    if stream == "q":
        return ROOT / "configs" / "quickstart.yaml"
    from methods_data import write_grey
    from science.plan import stream_config

    config = stream_config("grey", work)
    config["model"]["optimizer"] = {"class_path": "AdamW", "init_args": {"lr": 3e-4, "weight_decay": 0.0}}
    config["stream"]["init_args"]["val_fraction"] = 0.1
    file = work / "grey.yaml"
    file.write_text(yaml.safe_dump(config))
    if not (work / "grey" / "mnist.npz").is_file():
        write_grey(data, work / "grey", seed=0, num_train=NUM_GREY)
    return file


def rows_of(work: Path, stream: str, seed: int) -> dict[str, dict[str, Any]]:
    """Return the figures of every model of one run."""
    found: dict[str, dict[str, Any]] = {}
    for kind in COMPARISONS:
        file = work / f"c_{stream}{seed}_{kind}" / "results.json"
        if not file.is_file():
            continue
        [run] = json.loads(file.read_text())["runs"]
        for name, model in run["models"].items():
            if name in found:
                continue
            agnostic, aware = model["task_agnostic"], model["task_aware"]
            found[name] = {
                "data": model["data"],
                "agnostic": agnostic and agnostic["last"],
                "aware": aware and aware["last"],
                "forgetting": agnostic and agnostic["forgetting"],
                "bytes": model["bytes_kept"][-1] if model["bytes_kept"] else None,
                "seconds": sum(one or 0.0 for one in model["merge_seconds"] or []),
            }
    return found


def table(figures: dict[str, dict[str, dict[str, list[Any]]]]) -> str:
    """Return the table as Markdown: means over the seeds, with the standard deviation of accuracies.

    Seconds are the least of the seeds, which other programs disturbed least. The last column counts the seeds of the
    digits, and of the grey sets where they are others.
    """

    lines = [
        "| model | data | digits | told the task | forgetting | grey | told the task | MB kept | s | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    digits, grey = figures["q"], figures["g"]

    def place(name: str) -> float:
        kept = [value for value in digits[name]["agnostic"] if value is not None]
        return -statistics.mean(kept) if kept else 1.0

    for name in sorted(digits, key=place):
        one, other = digits[name], grey.get(name, {"agnostic": [], "aware": []})
        size = [value for value in one["bytes"] if value is not None]
        seeds = " + ".join(dict.fromkeys(str(len(row["aware"])) for row in (one, other)))
        lines.append(
            f"| {name} | {one['data'][0]} | {spread(one['agnostic'])} | {spread(one['aware'])} | "
            f"{spread(one['forgetting'])} | {spread(other['agnostic'])} | {spread(other['aware'])} | "
            f"{statistics.mean(size) / 1e6 if size else 0:.1f} | {min(one['seconds']):.1f} | {seeds} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["print"])
    parser.add_argument("--results", type=Path, help="figures of an earlier call")
    options = parser.parse_args()
    if options.results:
        print(table(json.loads(options.results.read_text())))
        return
    if options.work is None:
        parser.error("expected --work, or --results")
    work = options.work
    if options.only is None:
        if options.data is None:
            parser.error("expected --data, the folder of the data sets")
        work.mkdir(parents=True, exist_ok=True)
        for stream in "qg":
            config = config_of(stream, work, options.data)
            for seed in options.seeds:
                run = work / f"{stream}{seed}"
                if not (run / "results.json").is_file():
                    fixed = ["--learner.start_policy=base", "--mergers=WeightAverage", "--logging.wandb=false"]
                    seeds = [f"--seed={seed}", f"--stream.seed={seed}"]
                    clmerge(
                        "fit", f"--config={config}", *seeds, *fixed, f"--run_dir={run}", log=work / f"{run.name}.log"
                    )
                for kind, arguments in COMPARISONS.items():
                    out = work / f"c_{stream}{seed}_{kind}"
                    if not (out / "done").is_file():
                        clmerge("compare", str(run), f"--out={out}", *arguments, log=out.with_suffix(".log"))
                        (out / "done").touch()
                        print(f"{stream}{seed} {kind}", file=sys.stderr)
    figures: dict[str, dict[str, dict[str, list[Any]]]] = {}
    for stream in "qg":
        figures[stream] = {}
        for seed in options.seeds:
            for name, row in rows_of(work, stream, seed).items():
                into = figures[stream].setdefault(name, {key: [] for key in row})
                for key, value in row.items():
                    into[key].append(value)
    (work / "adaptive.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(table(figures))


if __name__ == "__main__":
    main()
