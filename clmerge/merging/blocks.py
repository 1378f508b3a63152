"""Walk over large tensors in blocks that stay in the processor's cache."""

from collections.abc import Iterator

from torch import Tensor

# A rule reads and writes a block several times. Blocks of half a megabyte keep that traffic out of main
# memory; a GPU wants few large kernels instead.
CPU_BLOCK = 1 << 17
DEVICE_BLOCK = 1 << 25


def blocks(*flat: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split 1-D tensors of one length into views of the same short pieces.

    Args:
        flat: Tensors of shape ``(numel,)`` on one device.

    Yields:
        One view per tensor; nothing at all for empty tensors.

    Example:
        >>> import torch
        >>> [len(a) for a, b in blocks(torch.zeros(300_000), torch.zeros(300_000))]
        [131072, 131072, 37856]
    """
    numel = flat[0].numel()
    size = CPU_BLOCK if flat[0].device.type == "cpu" else DEVICE_BLOCK
    if numel > size:
        for start in range(0, numel, size):
            yield tuple(tensor[start : start + size] for tensor in flat)
    elif numel:
        yield flat
