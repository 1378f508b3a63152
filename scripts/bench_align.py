"""Measure the weight matching of a ViT-B/32: CPU seconds, and memory beside the two models.

    python scripts/bench_align.py [--name ViT-B-32] [--independent]

The second model is the first one with its units in another order, plus noise of 0.3 standard deviations of every
tensor; with --independent it is another random initialisation, which has no match and is the slowest case. Weights are
random: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import resource
import time

import open_clip
import torch

from clmerge.alignment import WeightMatching, random_reparametrization, spec_of


def main() -> None:
    """Measure once and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="ViT-B-32")
    parser.add_argument("--independent", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tower = open_clip.create_model(given.name).visual
    spec = spec_of(tower)
    reference = {name: tensor.detach().clone() for name, tensor in tower.state_dict().items()}
    del tower
    generator = torch.Generator().manual_seed(1)
    hidden = random_reparametrization(spec, generator)
    if given.independent:
        other = {
            name: tensor.detach().clone()
            for name, tensor in open_clip.create_model(given.name).visual.state_dict().items()
        }
    else:
        other = hidden.apply(reference)
        for tensor in other.values():
            if tensor.numel() > 1:
                tensor += 0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    size = sum(tensor.nbytes for tensor in reference.values())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.perf_counter(), time.process_time()
    found = WeightMatching().match(reference, other, spec)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - started
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{given.name}, {size / 1e6:.0f} MB a model, {os.cpu_count()} cores, torch with 1 thread")
    print(f"{cpu:.1f} CPU s, {wall:.1f} s; peak memory grew by {max(more, 0) * 1024 / 1e6:.0f} MB")
    if not given.independent:
        wrong = max(found.compose(hidden).moved().values())
        print(f"largest share of a group's units that were matched wrongly: {wrong:.4f}")


if __name__ == "__main__":
    main()
