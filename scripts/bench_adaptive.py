"""What a step of a rule that learns costs beside plain training of the same batch, on the shapes of CLIP's ViT-B/32.

    python scripts/bench_adaptive.py --tasks 8

Weights, task vectors and images are random, since neither time nor memory depends on them. Every measurement is a
process of its own; seconds are those of the CPU. Memory is anonymous memory beyond that of the model and theta_0, in
copies of the model; pages of the bank's files, which the system drops when it needs room, are not in it, and tensors
have mappings of their own, so that memory which the allocator keeps for later does not count. The script ends with 1
if a step takes more than 1.3 times as long as plain training of the same batches, or holds more than the merged
weights, their gradient and one parameter beside the activations.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from clmerge.deploy.learning import learning
from clmerge.merging import AdaMerging
from clmerge.weights import BankVector, TaskVectorBank

MOST_MODELS, MOST_TIME = 2.1, 1.3  # the merged weights, their gradient, and what one parameter takes
MAPPED = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives what is larger back at once


def tower(name: str) -> nn.Module:
    """Return an image tower with a head, at random weights."""
    import open_clip

    torch.manual_seed(0)
    visual = open_clip.create_model(name).visual
    return nn.Sequential(visual, nn.Linear(visual.output_dim, 10)).eval()


class Memory(threading.Thread):
    """The largest anonymous memory of this process while it is watched, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest, self.ended = 0, threading.Event()
        self.start()

    @staticmethod
    def now() -> int:
        """Return the anonymous memory now."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def run(self) -> None:
        """Look again and again."""
        while not self.ended.wait(0.01):
            self.largest = max(self.largest, self.now())


def batches(num_tasks: int, num_images: int, size: tuple[int, int]) -> list[torch.Tensor]:
    """Return a batch of random images for every task."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num_images, 3, *size, generator=generator) for _ in range(num_tasks)]


def entropy(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the mean entropy of the model's predictions."""
    log_p = functional.log_softmax(model(images), dim=1)
    return -(log_p.exp() * log_p).sum(dim=1).mean()


def measure(what: str, bank: TaskVectorBank, args: argparse.Namespace) -> dict[str, float]:
    """Return seconds per step and copies of the model."""
    model = tower(args.model)
    visual = {name: tensor for name, tensor in model.named_parameters() if name.startswith("0.")}
    size = sum(tensor.nbytes for tensor in visual.values())
    base = {name: tensor.detach().clone() for name, tensor in visual.items()}
    images = batches(args.tasks, args.images, model[0].image_size)
    before, watch, times = Memory.now(), Memory(), []
    if what == "plain":
        for _ in range(args.steps + 1):
            started = time.process_time()
            for batch in images:
                torch.autograd.backward(entropy(model, batch))
            model.zero_grad()
            times.append(time.process_time() - started)
    else:

        def losses(model, request):  # noqa: ANN001, ANN202
            while True:
                times.append(-time.process_time())
                if len(times) > 1:
                    times[-2] -= times[-1]
                yield [lambda model, batch=batch: entropy(model, batch) for batch in images]

        merger = AdaMerging(steps=0)
        for task in range(args.tasks - 1):
            merger.update(BankVector(bank, task), gradients=lambda *_, **__: None)
        merger.steps = args.steps + 2
        with learning(model, base, losses, buffers={}, origin="theta_0") as gradients:
            merger.update(BankVector(bank, args.tasks - 1), gradients=gradients)
        times.pop()
    watch.ended.set()
    return {"seconds": min(times[1:]), "models": (watch.largest - before) / size}


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="a model of open_clip")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--images", type=int, default=16, help="images of every task in a step")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", choices=["plain", "learned"], help="one measurement, in this process")
    parser.add_argument("--bank", help="folder of the task vectors of --only")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, TaskVectorBank(args.bank), args)))
        return 0
    found = {}
    with tempfile.TemporaryDirectory(dir=args.bank) as folder:
        bank = TaskVectorBank(folder)
        names = dict(tower(args.model).named_parameters())
        for task in range(args.tasks):
            generator = torch.Generator().manual_seed(task)
            vector = {n: 1e-3 * torch.randn(p.shape, generator=generator) for n, p in names.items() if n[0] == "0"}
            bank.append(task, vector)
        for what in ("plain", "learned"):
            command = [sys.executable, __file__, "--only", what, "--bank", folder, "--model", args.model]
            command += [f"--{name}={getattr(args, name)}" for name in ("tasks", "images", "steps")]
            text = subprocess.run(command, check=True, capture_output=True, text=True, env=MAPPED).stdout
            found[what] = json.loads(text.splitlines()[-1])
            print(
                f"{what}: {found[what]['seconds']:.2f} CPU s a step, {found[what]['models']:.2f} models of memory",
                flush=True,
            )
    more = found["learned"]["models"]
    ratio = found["learned"]["seconds"] / found["plain"]["seconds"]
    print(
        f"{args.tasks} tasks of {args.images} images: a step takes {ratio:.2f} times as long, {more:.2f} models at most"
    )
    return int(more > MOST_MODELS + found["plain"]["models"] - 1 or ratio > MOST_TIME)


if __name__ == "__main__":
    raise SystemExit(main())
