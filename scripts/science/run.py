"""Train what the tables of docs/methods.md, claims.md and predictors.md need, merge it again, and collect the figures.

    python scripts/methods_data.py --data FOLDER --work WORK     # once: the streams and the pretrained ViTs
    python scripts/science/run.py --work WORK                    # trains and compares what is missing; hours
    python scripts/science/run.py --work WORK --only collect     # writes docs/results/methods.json from what is there
    python scripts/science/run.py --work WORK --rates 1e-4 3e-4 1e-3 --ways "LoRA, base"
                                                 # instead: validation accuracy of learning rates, on another seed
    python scripts/science/run.py --work WORK --strengths     # and of regularizers' strengths, those of the plan
    python scripts/science/pages.py                              # writes tables and figures into the docs

Runs are independent and go to several processes, forked after the imports, which cost as much as a small run. What is
finished under WORK is not repeated; what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # runs are parallel, not their matrix products
os.environ["WANDB_MODE"] = "offline"

import torch
import yaml
from plan import (
    COMPARISONS,
    EPOCHS,
    MORE_SEEDS,
    SEEDS,
    TRIAL_SEED,
    TRIED,
    WAYS,
    Run,
    Study,
    config_of,
    studies,
    trial_of,
)


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


def command(main: Callable[[Sequence[str]], int], arguments: Sequence[str], log: Path) -> None:
    """Run a command in this process with its output in a file, and stop where it fails."""
    torch.set_num_threads(1)
    with log.open("a") as sink, redirected(sink.fileno()):
        code = main(arguments)
    if code:
        raise RuntimeError(f"expected a command that ends well, got exit code {code}; see {log}")


def train(run: Run, work: Path) -> Path:
    """Train a run, if it is not there, and return its folder."""
    from clmerge.cli.fit import main

    folder = work / "runs" / run.name
    manifest = folder / "manifest.json"
    if manifest.is_file() and json.loads(manifest.read_text())["finished"]:
        return folder
    os.environ.pop("CLMERGE_RUN_DIR", None)
    arguments = ["--resume", str(folder)]
    if not manifest.is_file():
        arguments = ["--run_dir", str(folder)]
        for part, config in enumerate(config_of(run, work)):
            file = work / "configs" / f"{run.name}-{part}.yaml"
            file.write_text(yaml.safe_dump(config))
            arguments += ["--config", str(file)]
    command(main, arguments, work / "logs" / f"{run.name}.log")
    return folder


def study(job: tuple[Study, Path]) -> str:
    """Do one study; return what it was and what it took."""
    from clmerge.cli.compare import main

    (one, work), started = job, time.process_time()
    folder = train(one.run, work)
    for name in one.comparisons:
        out = work / "compared" / f"{one.run.name}--{name}"
        if not (out / "done").is_file():
            log = work / "logs" / f"{out.name}.log"
            command(main, [str(folder), f"--out={out}", *COMPARISONS[name]], log)
            (out / "done").touch()
    return f"{one.run.name} {' '.join(one.comparisons)}: {time.process_time() - started:.0f} CPU s"


def attempted(job: tuple[Study, Path]) -> tuple[str, bool]:
    """Do one study; a fault ends this study and not the others."""
    try:
        return study(job), True
    except (Exception, SystemExit) as error:  # a refused option exits
        return f"{job[0].run.name}: {error}", False


def run_all(jobs: list[tuple[Study, Path]], workers: int) -> int:
    """Do what is missing, several studies side by side, and say how far it is; return how many failed."""
    import clmerge.cli.compare
    import clmerge.cli.fit

    clmerge.cli.fit.build_parser()  # imports everything once, before the workers are forked
    clmerge.cli.compare.build_parser()
    failed = 0
    with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=8) as pool:
        for count, (told, well) in enumerate(pool.imap_unordered(attempted, jobs), start=1):
            failed += not well
            print(f"{count}/{len(jobs)} {'' if well else 'FAILED '}{told}", file=sys.stderr, flush=True)
    return failed


def main() -> int:
    """Run, and collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of methods_data.py")
    parser.add_argument("--streams", nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--more-seeds", nargs="*", type=int, default=list(MORE_SEEDS), help="of what claims compare")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=["collect"])
    parser.add_argument("--rates", nargs="+", type=float, help="compare learning rates instead")
    parser.add_argument("--strengths", action="store_true", help="compare strengths of regularizers instead")
    options = parser.parse_args()
    work: Path = options.work.resolve()
    for name in ("runs", "configs", "logs", "compared"):
        (work / name).mkdir(parents=True, exist_ok=True)
    if options.rates or options.strengths:
        pairs = [(stream, way) for stream in options.streams for way in options.ways]
        trials = [Run(*pair, TRIAL_SEED, rate=rate) for pair in pairs for rate in options.rates or ()]
        if options.strengths:
            tried = ((stream, way, value) for stream, way in pairs for value in TRIED.get(way, {}).get(stream, ()))
            trials += [Run(stream, way, TRIAL_SEED, strength=value) for stream, way, value in tried]
        failed = run_all([(Study(run, (trial_of(run),)), work) for run in trials], options.workers)
        from collect import validation_accuracy

        for run in trials:
            print(f"{run.stream:<8} {run.way:<18} {run.strength or run.lr:g}: {validation_accuracy(work, run)}")
        return int(failed > 0)
    chosen = [one for one in studies(options.streams, options.seeds, options.more_seeds) if one.run.way in options.ways]
    failed = 0
    if options.only is None:
        failed = run_all([(one, work) for one in chosen], options.workers)
    from collect import collect

    collect([*studies(list(EPOCHS), list(SEEDS), list(MORE_SEEDS)), *chosen], work)  # also what was finished before
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
