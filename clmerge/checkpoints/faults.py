"""Find the file and tensor that caused a failed merge."""

import re
from collections.abc import Iterable, Sequence

from clmerge.checkpoints.reader import Checkpoint
from clmerge.merging.checks import is_finite


def explained(error: Exception, base: Checkpoint, models: Sequence[Checkpoint], names: Iterable[str]) -> str:
    """Return the message for an error while merging, with the file and tensor that caused it.

    Args:
        error: The error that merging raised.
        base: The base model.
        models: The models, in the order of their tasks.
        names: The tensors that are merged.
    """
    names = list(names)
    largest = (0.0, "")
    for checkpoint in (*models, base):
        for name in names:
            if name not in checkpoint.entries:
                continue
            tensor = checkpoint.tensor(name)
            if not is_finite(tensor):
                return (
                    f"expected finite values in {checkpoint.source}, got NaN or Inf in {name!r}; leave the model out, "
                    "or look for a training run that diverged"
                )
            if tensor.numel():
                largest = max(largest, (float(tensor.abs().max()), f"{name!r} of {checkpoint.source}"))
    text = " ".join(str(error).split())
    if "overflow" in text:
        return f"{text}; the largest entry, {largest[0]:.3g}, is in {largest[1]}"
    task = re.search(r"\btask (\d+)\b", text)
    if task and int(task[1]) < len(models):
        return f"{text} (task {task[1]} is {models[int(task[1])].source})"
    return text
