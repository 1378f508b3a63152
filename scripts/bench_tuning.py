"""Measure a training step of every mode of tuning against ordinary fine-tuning: CPU time and peak memory, in one run.

python scripts/bench_tuning.py [--models nano vit_b_32 vit_s_16] [--modes full linearized ...] [--batch 8] [--rounds 5]
    [--no-compile] [--threads 1]

Weights and images are random. A step is forward, backward and AdamW; an evaluation is a forward pass without gradients.
Modes take turns step by step, and every ratio is to the full step of the same round (compiled: to the compiled full
step), so that a busy machine disturbs them alike; the table gives medians over the rounds, in CPU seconds. Peak memory
is that of a process of its own that takes two steps, less what it held before the model was built (on Linux).
"""

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from clmerge.models import (
    IA3,
    Adapters,
    Backbone,
    Full,
    Linearized,
    LinearizedLoRA,
    LoRA,
    OpenClip,
    Partial,
    Timm,
    Tuning,
)

MODELS: dict[str, tuple[Callable[[], Backbone], int]] = {
    "nano": (lambda: OpenClip("nano"), 28),
    "vit_b_32": (lambda: OpenClip("ViT-B-32"), 224),
    "vit_s_16": (lambda: Timm("vit_small_patch16_224"), 224),
}
MODES: dict[str, Callable[[], Tuning]] = {
    "full": Full,
    "partial_attention": lambda: Partial("attention"),
    "lora": LoRA,
    "ia3": IA3,
    "adapters": Adapters,
    "linearized": Linearized,
    "linearized_checkpointing": lambda: Linearized(checkpointing=True),
    "linearized_attention": lambda: Linearized(scope="attention"),
    "linearized_lora": LinearizedLoRA,
}


class Step:
    """One training step, or one evaluation, of one mode."""

    def __init__(self, model: str, mode: str, batch: int) -> None:
        build, size = MODELS[model]
        torch.manual_seed(0)
        backbone = build()
        MODES[mode]().prepare(backbone)
        for tower in ("transformer", "token_embedding"):  # the text tower of CLIP, which no step uses
            backbone.model._modules.pop(tower, None)
        self.module: nn.Module = backbone
        self.images = torch.randn(batch, 3, size, size)
        self.optimizer = AdamW([p for p in backbone.parameters() if p.requires_grad], lr=1e-5)
        self.forward: Callable[[Tensor], Tensor] = backbone

    def train(self) -> None:
        self.module.train()
        self.optimizer.zero_grad()
        self.forward(self.images).square().mean().backward()
        self.optimizer.step()

    def evaluate(self) -> None:
        self.module.eval()
        with torch.no_grad():
            self.forward(self.images)


def seconds(work: Callable[[], None]) -> float:
    """CPU seconds of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def take_turns(model: str, modes: Sequence[str], batch: int, rounds: int, *, compiled: bool) -> dict[str, list[float]]:
    """Return mode -> median milliseconds and ratio of a step, then of an evaluation."""
    steps = {mode: Step(model, mode, batch) for mode in modes}
    for mode, step in steps.items():
        if compiled:
            torch._dynamo.reset()
            step.forward = torch.compile(step.module)
        step.train()
        step.evaluate()
        print(f"{model} {mode} {'compiled' if compiled else ''} is warm", file=sys.stderr, flush=True)
    figures: dict[str, list[float]] = {mode: [] for mode in modes}
    for kind in ("train", "evaluate"):
        times = [{mode: seconds(getattr(step, kind)) for mode, step in steps.items()} for _ in range(rounds)]
        for mode in modes:
            figures[mode].append(1000 * statistics.median(t[mode] for t in times))
            figures[mode].append(statistics.median(t[mode] / t[modes[0]] for t in times))
    return figures


def peak(model: str, mode: str, batch: int) -> float:
    """Megabytes that two training steps need in this process."""
    MODELS["nano"][0]()  # imports what building a model imports
    before = kilobytes("VmRSS")
    step = Step(model, mode, batch)
    step.train()
    step.train()
    return (kilobytes("VmHWM") - before) / 1024


def kilobytes(field: str) -> int:
    """Read a figure of this process from Linux: ``VmRSS`` is its memory now, ``VmHWM`` the most it ever was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peak_elsewhere(model: str, mode: str, batch: int) -> float:
    command = [sys.executable, __file__, "--peak", model, mode, "--batch", str(batch)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> int:
    """Measure and print one table per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(*options.peak, options.batch))
        return 0
    modes = ["full", *(mode for mode in options.modes if mode != "full")]
    for model in options.models:
        eager = take_turns(model, modes, options.batch, options.rounds, compiled=False)
        fast = {} if options.no_compile else take_turns(model, modes, options.batch, options.rounds, compiled=True)
        memory = {mode: peak_elsewhere(model, mode, options.batch) for mode in modes}
        print(f"\n{model}, batch {options.batch}, torch {torch.__version__}, {options.threads} thread(s)\n")
        print("| mode | step, ms | ratio | compiled, ms | ratio | evaluation | compiled | peak, MB | ratio |")
        print("|---|---|---|---|---|---|---|---|---|")
        whole = memory["full"]
        for mode in modes:
            step, ratio, _, evaluation = eager[mode]
            compiled = [f"{fast[mode][0]:.0f}", *(f"{fast[mode][i]:.2f}" for i in (1, 3))] if fast else ["-"] * 3
            cells = [f"{step:.0f}", f"{ratio:.2f}", *compiled[:2], f"{evaluation:.2f}", compiled[2]]
            print(f"| {' | '.join([mode, *cells, f'{memory[mode]:.0f}', f'{memory[mode] / whole:.2f}'])} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
