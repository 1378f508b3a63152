"""Measure what averaging along a fit costs beside a training step of ViT-B/32, in one run.

python scripts/bench_trajectory.py [--batch 32] [--steps 4] [--threads 2] [--tiny]

Training steps (forward, backward, AdamW) of open_clip's CLIP ViT-B/32, whose image tower is trained, alternate with
collections by every rule, and by Lightning's EMAWeightAveraging; the table gives medians of CPU seconds, which other
programs disturb less, their share of the step, and the bytes kept. `--tiny` runs the same on small shapes.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import open_clip
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from clmerge.training.trajectory import EMA, Accepting, Latest, LossValley, Mean, TrajectoryRule


class Module(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def timed(function: Callable[[], object], times: int) -> float:
    """Return the median of the CPU seconds of several calls, the first of which is left out."""
    seconds = []
    for _ in range(times + 1):
        started = time.process_time()
        function()
        seconds.append(time.process_time() - started)
    return statistics.median(seconds[1:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.tiny:
        vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
        text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
        model: nn.Module = open_clip.CLIP(32, vision_cfg=vision, text_cfg=text)
    else:
        model = open_clip.create_model("ViT-B-32", pretrained=None)
    model.requires_grad_(False)
    tower: nn.Module = model.visual
    tower.requires_grad_(True)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-5)
    size = 16 if options.tiny else 224
    images = torch.randn(options.batch, 3, size, size)

    def step() -> None:
        optimizer.zero_grad()
        tower(images).square().mean().backward()
        optimizer.step()

    whole = timed(step, options.steps)
    weights = {name: p for name, p in tower.named_parameters()}
    trained = 4 * sum(p.numel() for p in weights.values())
    print(f"training step, batch {options.batch}: {whole:.3f} CPU s; {trained / 2**20:.0f} MiB trained in float32\n")
    print(f"{'rule':28}{'CPU s':>8}{'of a step':>11}{'kept, in copies of what is trained':>37}")

    def row(name: str, seconds: float, kept: int) -> None:
        print(f"{name:28}{seconds:8.3f}{seconds / whole:11.1%}{kept / trained:37.2f}")

    rules: list[TrajectoryRule] = [Mean(), EMA(), Latest(3), LossValley(), Accepting()]
    for rule in rules:
        seconds = timed(lambda rule=rule: rule.collect(weights), 6)  # type: ignore[misc]
        row(type(rule).__name__, seconds, rule.nbytes)
        rule.reset()
    module = Module(model)
    lightning = EMAWeightAveraging(decay=0.999)
    lightning.setup(None, module, "fit")  # type: ignore[arg-type]
    averaged = lightning._average_model
    assert averaged is not None
    seconds = timed(lambda: averaged.update_parameters(module), 6)
    row("Lightning's EMA, all of CLIP", seconds, sum(t.nbytes for t in averaged.state_dict().values()))


if __name__ == "__main__":
    main()
