"""Time a routed forward pass against the plain one, on image towers of CLIP with random weights.

python scripts/bench_routing.py                          ViT-B-32, 8 tasks, rank 16
python scripts/bench_routing.py --name nano --batch 64   the small CLIP that is part of clmerge
python scripts/bench_routing.py --device cuda --batch 128
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from clmerge.deploy.routing import DAM, Deployment, Mingle, Routing, Smile, TaskOracle, WEMoE
from clmerge.deploy.routing.experts import Expert
from clmerge.deploy.routing.routing import Frame
from clmerge.models import LinearHead, OpenClip


def seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Return the time of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def made(routing: Routing, frame: Frame, num_tasks: int, rank: int) -> nn.Module:
    """Return the routed model of tasks with random experts; what a router keeps of a task is random, too."""
    layers, tasks = routing.layers(frame), range(num_tasks)
    for task in tasks:
        routing.experts[task] = {}
        for layer in layers:
            out, width = frame.base[f"{layer}.weight"].shape
            factors = torch.randn(rank, width) / width, torch.randn(rank, out) / rank
            routing.experts[task][layer] = Expert(*factors, torch.zeros(out))
            if isinstance(routing, Mingle):
                routing.weights.setdefault(task, {})[layer] = torch.zeros(width)
                routing.biases.setdefault(task, {})[layer] = torch.ones(())
        if isinstance(routing, DAM):
            routing.kept[task] = {"mean": torch.randn(frame.feature_dim)}
    classes = [[task] for task in tasks]
    deployment = Deployment(tasks, classes, num_tasks, frame.base, frame, lambda task: {}, lambda: iter(()), 0)
    return routing.build(deployment).to(frame.device)


def main() -> None:
    """Print the time of the plain pass, and of each routed one as a multiple of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="ViT-B-32")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    torch.manual_seed(0)
    backbone = OpenClip(given.name).eval().requires_grad_(False)
    head = LinearHead()
    head.build(backbone, given.tasks, ())
    head.add_classes(range(given.tasks))
    base = {name: one.detach() for name, one in backbone.named_parameters() if name.startswith("model.visual")}
    size = backbone.model.visual.image_size
    images = torch.randn(given.batch, 3, *((size, size) if isinstance(size, int) else size))
    frame = Frame(backbone, head, base, device)
    plain = nn.Sequential(frame.model({}), head).to(device)
    rank = given.rank
    routings = {
        "oracle (the experts alone)": TaskOracle(rank=rank),
        "Smile": Smile(rank=rank, gate_k=min(16, rank)),
        "Mingle": Mingle(rank=rank, steps=0, directions=0),
        "WEMoE": WEMoE(rank=rank, steps=0),
        "DAM (two passes)": DAM(rank=rank),
    }
    models = {name: made(routing, frame, given.tasks, rank) for name, routing in routings.items()}
    images = images.to(device)
    with torch.inference_mode():
        times: dict[str, list[float]] = {name: [] for name in ("plain", *models)}
        for round_ in range(given.rounds + 1):
            for name, model in (("plain", plain), *models.items()):
                took = seconds(lambda model=model: model(images), device)
                if round_:  # the first one warms up
                    times[name].append(took)
    reference = statistics.median(times["plain"])
    print(f"{given.name}, {given.tasks} tasks, rank {rank}, {given.batch} images on {device}")
    print(f"{'plain':32} {1e3 * reference:.0f} ms")
    for name in models:
        ratios = [took / own for took, own in zip(times[name], times["plain"], strict=True)]
        print(
            f"{name:32} {statistics.median(ratios):.2f} times the plain pass, {models[name].num_bytes / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()
