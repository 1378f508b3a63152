"""CPU time of a training step with every regularizer, SAM and ASAM against the plain step, in one run.

python scripts/bench_losses.py [--rounds 9] [--batch 128] [--backbone nano]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from clmerge import ContinualClassifier
from clmerge.models import OpenClip
from clmerge.training.regularizers import (
    EWC,
    IEL,
    ITA,
    L2,
    FeatureDistance,
    LwF,
    Regularizer,
    current_weights,
    regularized_logits,
)
from clmerge.training.sharpness import ASAM, SAM

ADAM = partial(torch.optim.AdamW, lr=1e-5)


def build_step(
    backbone: str, batch: int, size: int, *regularizers: Regularizer, optimizer: Callable[..., Optimizer] = ADAM
) -> Callable[[], object]:
    """Return a function that takes one optimizer step of a second task."""
    torch.manual_seed(0)
    module = ContinualClassifier(OpenClip(backbone), loss_classes="all", regularizers=list(regularizers))
    module.begin_stream(4, [["a"], ["b"], ["c"], ["d"]])

    def fisher() -> dict[str, Tensor]:
        return {name: torch.rand_like(weight) for name, weight in current_weights(module).items()}

    for task in range(2):
        module.begin_task([2 * task, 2 * task + 1])
        for regularizer in regularizers:
            regularizer.begin_task(module, fisher)
            if task == 0:
                regularizer.end_task(module, fisher)
    stepper = optimizer([parameter for parameter in module.parameters() if parameter.requires_grad])
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 4, (batch,))

    def closure() -> Tensor:
        stepper.zero_grad()
        if regularizers:
            logits, terms = regularized_logits(module, list(module.regularizers), images)
            loss = module.loss(logits, labels)
            loss = loss + sum(terms.values())
        else:
            loss = module.loss(module(images), labels)
        loss.backward()
        return loss

    return lambda: stepper.step(closure)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--backbone", default="nano", help="an open_clip model name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = OpenClip(options.backbone).model.visual.image_size
    build = partial(build_step, options.backbone, options.batch, size[0] if isinstance(size, tuple) else size)
    steps = {"plain": build()}
    for one in (L2(1.0), EWC(), ITA(), IEL(1.0), LwF(), FeatureDistance(1.0)):
        steps[type(one).__name__] = build(one)
    for kind in (SAM, ASAM):
        steps[kind.__name__] = build(optimizer=lambda parameters, kind=kind: kind(parameters, ADAM))
    seconds = {name: [] for name in steps}
    for number in range(options.rounds + 1):  # the first is a warm-up
        for name, step in steps.items():
            started = time.process_time()
            step()
            if number:
                seconds[name].append(time.process_time() - started)
    plain = statistics.median(seconds["plain"])
    for name, values in seconds.items():
        print(f"{name:16s} {1e3 * statistics.median(values):8.1f} ms {statistics.median(values) / plain:6.2f}")


if __name__ == "__main__":
    main()
