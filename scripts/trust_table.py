"""Compare all mergers by what they do beyond accuracy, on the quickstart's stream over seeds; print the table.

python scripts/trust_table.py --work WORK [--seeds 0 1 2] [--only print]

The first task is poisoned (configs/scenarios/backdoor.yaml) and carries a watermark in its weights
(configs/scenarios/watermark.yaml); experts start from the base model. Every merger of the registry that needs neither
adaptation data nor labels merges the same task vectors, and every model is probed after the last task. What is complete
under WORK is not repeated. The figures are written to WORK/trust.json; `--results FILE` prints the table of such a
file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from table_runs import clmerge, spread

ROOT = Path(__file__).resolve().parent.parent
SCENARIOS = [f"--config={ROOT / 'configs' / 'scenarios' / name}.yaml" for name in ("backdoor", "watermark")]
ACCURACY = "average accuracy"
OTHERS = {"Ethos", "ExtSub", "SSU", "FactorProduct", "Pipeline"}  # for unlearning, for factors, a frame for other rules


def mergers() -> list[str]:
    """Return the mergers that merge task vectors without looking at images of a buffer."""
    from clmerge.merging import registered_mergers

    return [
        name
        for name, kind in sorted(registered_mergers().items())
        if not (kind.requires_gradient or kind.requires_score or "adam" in kind().requires or name in OTHERS)
    ]


def figures_of(file: Path) -> dict[str, dict[str, float | None]]:
    """Return accuracy and probes of every model of a comparison."""
    [run] = json.loads(file.read_text())["runs"]
    found = {}
    for name, model in run["models"].items():
        reading = model["task_agnostic"] or model["task_aware"]
        probes = {probe: one["value"] for probe, one in model["probes"].items() if "value" in one}
        found[name] = {ACCURACY: reading["last"], **probes}
    return found


def table(figures: dict[str, dict[str, list[float | None]]], shares: list[str]) -> str:
    """Return the table as Markdown, the most accurate model first: means over the seeds, with standard deviations."""
    probes = list(dict.fromkeys(key for row in figures.values() for key in row if key != ACCURACY))

    def cell(name: str, key: str) -> str:
        factor, digits = (100, 1) if key in shares else (1, 3)
        return spread(figures[name].get(key, []), factor=factor, digits=digits)

    def place(name: str) -> float:
        kept = [value for value in figures[name][ACCURACY] if value is not None]
        return -statistics.mean(kept) if kept else 1.0

    heads = [f"{key.replace('_', ' ')}{' (%)' if key in shares else ''}" for key in (ACCURACY, *probes)]
    lines = [f"| model | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    columns = (ACCURACY, *probes)
    lines += [f"| {name} | {' | '.join(cell(name, key) for key in columns)} |" for name in sorted(figures, key=place)]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["print"])
    parser.add_argument("--results", type=Path, help="figures of an earlier call")
    options = parser.parse_args()
    if options.results:
        known = json.loads(options.results.read_text())
        print(table(known["figures"], known["shares"]))
        return
    if options.work is None:
        parser.error("expected --work, or --results")
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    probes = ["{class_path: AttackSuccess, init_args: {target: 0, tasks: [0], after: last}}"]
    probes += [f"{{class_path: PGDAccuracy, init_args: {{eps: {4 / 255}, steps: 10, num_images: 40}}}}"]
    probes += ["CorruptionAccuracy", "{class_path: CalibrationError, init_args: {after: last}}"]
    if options.only is None:
        probes += watermark_probes()
        for seed in options.seeds:
            run, out = work / f"run{seed}", work / f"compare{seed}"
            if not (run / "results.json").is_file():
                quick = [f"--config={ROOT / 'configs' / 'quickstart.yaml'}", *SCENARIOS]
                fixed = ["--mergers=WeightAverage", "--logging.wandb=false", f"--seed={seed}", f"--stream.seed={seed}"]
                clmerge("fit", *quick, *fixed, "--learner.probes=[]", f"--run_dir={run}", log=work / f"run{seed}.log")
            if not (out / "done").is_file():
                chosen = ["--mergers", *mergers(), f"--probes=[{', '.join(probes)}]"]
                clmerge("compare", str(run), f"--out={out}", *chosen, log=work / f"compare{seed}.log")
                (out / "done").touch()
    collected: dict[str, dict[str, list[Any]]] = {}
    shares: list[str] = [ACCURACY]
    for seed in options.seeds:
        file = work / f"compare{seed}" / "results.json"
        if not file.is_file():
            continue
        for name, row in figures_of(file).items():
            for key, value in row.items():
                collected.setdefault(name, {}).setdefault(key, []).append(value)
        [found] = json.loads(file.read_text())["runs"]
        shares += [p for m in found["models"].values() for p, one in m["probes"].items() if one.get("share")]
    known = {"shares": list(dict.fromkeys(shares)), "figures": collected}
    (work / "trust.json").write_text(json.dumps(known, indent=1) + "\n")
    print(table(known["figures"], known["shares"]))


def watermark_probes() -> list[str]:
    """Return the probes of the watermark scenario, with their keys, as options."""
    import yaml

    settings = yaml.safe_load((ROOT / "configs" / "scenarios" / "watermark.yaml").read_text())
    return [json.dumps(probe) for probe in settings["learner"]["probes"]]


if __name__ == "__main__":
    main()
