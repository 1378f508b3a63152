"""Merge two fine-tuned checkpoints of one base model, in Python.

    python examples/merge_two_checkpoints.py BASE FIRST SECOND OUT

The files are safetensors with the same names and shapes. For files that do not fit into memory, other formats and a
ledger of what was merged there is `clmerge merge`.
"""

import sys

from clmerge.merging import TIES
from clmerge.weights import apply_task_vector, load_tensors, save_tensors, task_vector


def main(base_file: str, *model_files: str, out: str) -> None:
    """Merge the models into ``out``."""
    base = load_tensors(base_file)
    weights = {name: tensor for name, tensor in base.items() if tensor.is_floating_point()}  # counters stay the base's
    merger = TIES(density=0.2, scale=1.0)
    for file in model_files:
        model = load_tensors(file)
        # The accumulator has one size, however many models there are.
        merger.update(task_vector({name: model[name] for name in weights}, weights))
    save_tensors(out, {**base, **apply_task_vector(weights, merger.compute())})


if __name__ == "__main__":
    *inputs, output = sys.argv[1:]
    main(*inputs, out=output)
