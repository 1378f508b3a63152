"""Measure what folding one task vector in costs, in copies of the model: what a training callback pays after a task.

python scripts/bench_update.py [--threads 1 2] [--blocks 12]

Every number is the least CPU time of several updates over the least of several copies, taken in turn in one process, on
CLIP's ViT-B/32 image tower in float32. Threads wait without spinning, which CPU time would count as work.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

RULES = ("TaskArithmetic", "MagMax", "TIES", "TIES, trim=tensor", "EMR", "DARE", "ModelStock")


def cpu_seconds(function: Callable[[], object]) -> float:
    """Return the CPU time of a call."""
    started = time.process_time()
    function()
    return time.process_time() - started


def measure(threads: int, blocks: int, repeats: int) -> None:
    """Print one line per rule: its name and how many copies of the model an update costs."""
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    from bench_merge import shapes

    from clmerge import merging
    from clmerge.weights import CheckedVector

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    taus = [
        CheckedVector({name: 2e-4 * torch.randn(shape, generator=generator) for name, shape in shapes(blocks).items()})
        for _ in range(2)
    ]
    target = {name: torch.empty_like(tensor) for name, tensor in taus[0].items()}

    def copy() -> None:
        for name, tensor in taus[1].items():
            target[name].copy_(tensor)

    copy()
    for rule in RULES:
        name, _, trim = rule.partition(", trim=")
        merger = getattr(merging, name)(**({"trim": trim} if trim else {}))
        merger.update(taus[0])
        pairs = [(cpu_seconds(copy), cpu_seconds(partial(merger.update, taus[1]))) for _ in range(repeats)]
        copies, updates = zip(*pairs, strict=True)
        print(f"{rule}\t{min(updates) / min(copies):.1f}", flush=True)


def main() -> None:
    """Print a table: rules in rows, numbers of threads in columns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--blocks", type=int, default=12, help="transformer blocks of the model (default: 12)")
    parser.add_argument("--repeats", type=int, default=9, help="updates of which the cheapest counts (default: 9)")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        measure(options.worker, options.blocks, options.repeats)
        return
    columns = []
    for threads in options.threads:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        again = [sys.executable, __file__, "--worker", str(threads), *sys.argv[1:]]
        lines = subprocess.run(again, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
        columns.append(dict(line.split("\t") for line in lines))
    print("| update of | " + " | ".join(f"{threads} thread(s)" for threads in options.threads) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for rule in RULES:
        print(f"| {rule} | " + " | ".join(column[rule] for column in columns) + " |")


if __name__ == "__main__":
    main()
