"""How many entries a device takes at once: blocks that fit in a CPU's cache, many small parameters on a GPU."""

from collections.abc import Iterator

import torch
from torch import Tensor

# A rule reads and writes a block several times, and blocks keep that traffic out of main memory. PyTorch
# gives a thread no less than 32768 entries; with four times as many, 512 KiB, the calls themselves cost little. A GPU
# wants few large kernels instead.
CPU_BLOCK = 1 << 17
DEVICE_BLOCK = 1 << 24
ONE_BY_ONE = frozenset({"cpu"})  # kinds of devices that take every parameter by itself


def entries_at_once(device: torch.device) -> int:
    """Return how many entries of small parameters a device takes at once, 0 if it takes every parameter by itself.

    A GPU is idle between the kernels of small parameters; on a CPU a parameter that is copied beside others leaves the
    cache.

    Args:
        device: Where the parameters are.

    Example:
        >>> entries_at_once(torch.device("cpu"))
        0
    """
    return 0 if device.type in ONE_BY_ONE else DEVICE_BLOCK


def blocks(*flat: Tensor, cpu_block: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Split 1-D tensors of one length into views of the same short pieces.

    Args:
        flat: Tensors of shape ``(numel,)`` on one device.
        cpu_block: Entries per piece on the CPU. Default: ``CPU_BLOCK`` per thread, for up to 8 threads.

    Yields:
        One view per tensor; nothing for empty tensors.

    Example:
        >>> [len(a) for a, b in blocks(torch.zeros(10), torch.zeros(10), cpu_block=4)]
        [4, 4, 2]
    """
    numel = flat[0].numel()
    if flat[0].device.type == "cpu":
        size = cpu_block or CPU_BLOCK * min(torch.get_num_threads(), 8)
    else:
        size = DEVICE_BLOCK
    if numel > size:
        for start in range(0, numel, size):
            yield tuple(tensor[start : start + size] for tensor in flat)
    elif numel:
        yield flat
