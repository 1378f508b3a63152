"""Walk over large tensors in blocks that stay in the processor's cache."""

from collections.abc import Iterator

from torch import Tensor

# A rule reads and writes a block several times. Blocks of a quarter megabyte keep that traffic out of main
# memory; a GPU wants few large kernels instead.
CPU_BLOCK = 1 << 16
DEVICE_BLOCK = 1 << 24


def blocks(*flat: Tensor, cpu_block: int = CPU_BLOCK) -> Iterator[tuple[Tensor, ...]]:
    """Split 1-D tensors of one length into views of the same short pieces.

    Args:
        flat: Tensors of shape ``(numel,)`` on one device.
        cpu_block: Entries of a piece on the CPU.

    Yields:
        One view per tensor; nothing at all for empty tensors.

    Example:
        >>> import torch
        >>> [len(a) for a, b in blocks(torch.zeros(150_000), torch.zeros(150_000))]
        [65536, 65536, 18928]
    """
    numel = flat[0].numel()
    size = cpu_block if flat[0].device.type == "cpu" else DEVICE_BLOCK
    if numel > size:
        for start in range(0, numel, size):
            yield tuple(tensor[start : start + size] for tensor in flat)
    elif numel:
        yield flat
