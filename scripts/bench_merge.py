"""Measure what merging costs: CPU seconds and peak anonymous memory of every contender, each in its own process.

python scripts/bench_merge.py [--tasks 2 8] [--blocks 12] [--only TEXT ...] [--folder DIR] [--rounds 1]

Makes synthetic checkpoints of a ViT-B/32 image tower (87.8 M float32 parameters; --blocks makes it smaller), runs the
contenders one after another, --rounds times over, and prints medians as a Markdown table. "read and write" imports
torch, reads every input once and writes one output: no merge can cost less; "read, hash and write" computes the SHA-256
of all files, too, as clmerge does for its ledger. Ratios to them are medians of the ratios within a round, because the
speed of a shared machine drifts. Contenders that are not installed are skipped and named. FusionBench's TIES holds all
models several times over: eight of full size take more than 24 GB.
"""

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

BASELINE = """
import sys, torch
from safetensors import safe_open
from safetensors.torch import save_file
out, base, *models = sys.argv[1:]
with safe_open(base, "pt") as file:
    theta = {name: file.get_tensor(name).clone() for name in file.keys()}
buffer = torch.empty(max(tensor.numel() for tensor in theta.values()))
for model in models:
    with safe_open(model, "pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            buffer[: tensor.numel()].copy_(tensor.view(-1))
save_file(theta, out)
"""
HASHING = """
import hashlib
for path in (base, *models, out):
    with open(path, "rb") as file:
        hashlib.file_digest(file, "sha256")
"""


@dataclass(frozen=True)
class Contender:
    """A program that merges.

    Attributes:
        name: Its row in the table.
        command: Its command line, without the files.
        takes_options: Whether files are named by --base, --models and --out; else they follow as out, base, models.
    """

    name: str
    command: tuple[str, ...]
    takes_options: bool = True

    def arguments(self, out: Path, base: Path, models: list[Path]) -> list[str]:
        if not self.takes_options:
            return [*self.command, str(out), str(base), *map(str, models)]
        return [*self.command, "--base", str(base), "--models", *map(str, models), "--out", str(out)]


@dataclass
class Cost:
    """What a process used: CPU seconds, wall seconds, peak anonymous memory in GiB."""

    cpu: float
    wall: float
    peak: float


def shapes(blocks: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of CLIP's ViT-B/32 image tower."""
    found: dict[str, tuple[int, ...]] = {
        "class_embedding": (768,),
        "positional_embedding": (50, 768),
        "proj": (768, 512),
        "conv1.weight": (768, 3, 32, 32),
    }
    for name in ("ln_pre", "ln_post"):
        found |= {f"{name}.weight": (768,), f"{name}.bias": (768,)}
    for index in range(blocks):
        block = f"transformer.resblocks.{index}"
        for name in ("ln_1", "ln_2"):
            found |= {f"{block}.{name}.weight": (768,), f"{block}.{name}.bias": (768,)}
        found |= {f"{block}.attn.in_proj_weight": (2304, 768), f"{block}.attn.in_proj_bias": (2304,)}
        linear = {"attn.out_proj": (768, 768), "mlp.c_fc": (3072, 768), "mlp.c_proj": (768, 3072)}
        for name, shape in linear.items():
            found |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    return found


def make_checkpoints(folder: Path, tasks: int, blocks: int) -> tuple[Path, list[Path]]:
    """Write a base model and fine-tuned ones: the base plus a hundredth of noise."""
    generator = torch.Generator().manual_seed(0)
    theta = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes(blocks).items()}
    base = folder / "base.safetensors"
    if not base.exists():
        save_file(theta, base)
    models = []
    for task in range(tasks):
        generator = torch.Generator().manual_seed(1 + task)
        models.append(folder / f"model_{task}.safetensors")
        if not models[-1].exists():
            moved = {k: v + 2e-4 * torch.randn(v.shape, generator=generator) for k, v in theta.items()}
            save_file(moved, models[-1])
    return base, models


def contenders() -> tuple[list[Contender], list[str]]:
    """Return the contenders that are here, and the names of those that are not."""
    python = sys.executable
    merge = (python, "-m", "clmerge", "merge")
    ties = ("--merger", "TIES", "--merger.density=0.2")
    rules = {
        "TaskArithmetic": ("--merger", "TaskArithmetic"),
        "WeightAverage": ("--merger", "WeightAverage"),
        "MagMax": ("--merger", "MagMax"),
        "TIES, trim=tensor": (*ties, "--merger.trim=tensor"),
        "TIES, trim=model": ties,
    }
    found = [
        Contender("import torch", (python, "-c", "import torch, safetensors.torch"), takes_options=False),
        Contender("read and write", (python, "-c", BASELINE), takes_options=False),
        Contender("read, hash and write", (python, "-c", BASELINE + HASHING), takes_options=False),
        *(Contender(f"clmerge {name}, no hash", (*merge, *rule, "--no-hash")) for name, rule in rules.items()),
        *(Contender(f"clmerge {name}", (*merge, *rule)) for name, rule in rules.items()),
    ]
    absent = []
    for package, methods in PEERS.items():
        if importlib.util.find_spec(package) is None:
            absent.append(package)
            continue
        for method in methods:
            script = (python, __file__, "--peer", package, method)
            found.append(Contender(f"{package} {method}", script, takes_options=False))
    return found, absent


def run_mergekit(method: str, out: Path, base: Path, models: list[Path]) -> None:
    """Merge by mergekit's script for plain PyTorch checkpoints, with the settings that match."""
    from mergekit.scripts.merge_raw_pytorch import main

    parameters = {"weight": 1.0} | ({"density": 0.2} if method == "ties" else {})
    config = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(model), "parameters": parameters} for model in models],
    }
    recipe = out.with_suffix(".json")  # JSON is YAML, too
    recipe.write_text(json.dumps(config), encoding="utf-8")
    main([str(recipe), str(out), "--safe-serialization"], standalone_mode=True)


def run_fusion_bench(method: str, out: Path, base: Path, models: list[Path]) -> None:
    """Merge by FusionBench's algorithms, which take modules in memory, with the settings that match."""
    from fusion_bench.method.magmax import MagMaxAlgorithm
    from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
    from fusion_bench.method.ties_merging import TiesMergingAlgorithm
    from safetensors.torch import load_file

    def module(path: Path) -> torch.nn.Module:
        # Names of parameters have no dots.
        tensors = {name.replace(".", "/"): torch.nn.Parameter(tensor) for name, tensor in load_file(path).items()}
        return torch.nn.ParameterDict(tensors)

    algorithm = {
        "task_arithmetic": lambda: TaskArithmeticAlgorithm(scaling_factor=0.3),
        "magmax": lambda: MagMaxAlgorithm(scaling_factor=0.5),
        "ties": lambda: TiesMergingAlgorithm(scaling_factor=1.0, threshold=20, remove_keys=[], merge_func="mean"),
    }[method]()
    pool = {"_pretrained_": module(base)} | {path.stem: module(path) for path in models}
    merged = algorithm.run(pool).state_dict()
    save_file({name.replace("/", "."): tensor.detach().contiguous() for name, tensor in merged.items()}, out)


PEERS = {"mergekit": ("task_arithmetic", "ties"), "fusion_bench": ("task_arithmetic", "magmax", "ties")}
RUN_PEER = {"mergekit": run_mergekit, "fusion_bench": run_fusion_bench}


def measure(arguments: list[str], environment: dict[str, str]) -> Cost:
    """Run a process; return what it used.

    Raises:
        RuntimeError: If it fails.
    """
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment)
        with watched(process.pid) as peaks:
            _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(arguments[:5])} ...\n{log.read().decode(errors='replace')[-2000:]}")
    return Cost(usage.ru_utime + usage.ru_stime, wall, max(peaks, default=0) / 2**20)


@contextmanager
def watched(pid: int) -> Iterator[list[int]]:
    """Collect the anonymous memory of a process, in KiB, a hundred times a second."""
    found: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            try:
                lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
            except (FileNotFoundError, ProcessLookupError):
                return
            found.extend(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


FLOORS = ("read and write", "read, hash and write")


def table(rows: dict[tuple[str, int], list[Cost]]) -> str:
    """Return the medians over the rounds as Markdown; ratios are to the floors with as many models."""
    ratios = " | ".join(f"of {floor}" for floor in FLOORS)
    lines = [f"| contender | models | CPU s | {ratios} | wall s | peak anonymous GiB |", "|---" * 7 + "|"]
    for (name, tasks), costs in rows.items():
        cells = [name, str(tasks), f"{median(cost.cpu for cost in costs):.2f}"]
        for floor in FLOORS:
            found = [cost.cpu / least.cpu for cost, least in zip(costs, rows.get((floor, tasks), []), strict=False)]
            cells.append(f"{median(found):.2f}" if found else "")
        cells += [f"{median(cost.wall for cost in costs):.2f}", f"{median(cost.peak for cost in costs):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 8], help="numbers of models (default: 2 8)")
    parser.add_argument("--blocks", type=int, default=12, help="transformer blocks of the model (default: 12)")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="only contenders whose name has one of these texts, and read and write"
    )
    parser.add_argument("--folder", type=Path, help="where checkpoints are made and kept (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of every contender, in turn (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of every contender (default: 1)")
    options = parser.parse_args()
    chosen, absent = contenders()
    chosen = [one for one in chosen if any(text in one.name for text in options.only) or one.name == "read and write"]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    rows: dict[tuple[str, int], list[Cost]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        base, models = make_checkpoints(folder, max(options.tasks), options.blocks)
        for tasks, _, one in itertools.product(options.tasks, range(options.rounds), chosen):
            with tempfile.TemporaryDirectory(dir=folder) as output:
                out = Path(output) / "merged.safetensors"
                cost = measure(one.arguments(out, base, models[:tasks]), environment)
            rows.setdefault((one.name, tasks), []).append(cost)
            print(f"{one.name}, {tasks} models: {cost}", file=sys.stderr, flush=True)
    print(table(rows))
    if absent:
        print(f"\nSkipped, not installed: {', '.join(absent)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        chosen_peer, chosen_method, written, *inputs = sys.argv[2:]
        RUN_PEER[chosen_peer](chosen_method, Path(written), Path(inputs[0]), [Path(name) for name in inputs[1:]])
    else:
        main()
