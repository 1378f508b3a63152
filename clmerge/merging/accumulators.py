"""The accumulators of a merger: for every parameter a few tensors of its shape, by slot name."""

from collections.abc import Iterator

import torch
from torch import Tensor

from clmerge.merging.blocks import blocks
from clmerge.weights.task_vector import State, accumulator_dtype

Slots = dict[str, Tensor]
"""The accumulators of one parameter, by slot name."""

SlotDtypes = dict[str, torch.dtype | None]
"""Which accumulators there are; None is the floating dtype: float32, or float64 for float64 vectors."""


def allocate(vector: State, dtypes: SlotDtypes, device: torch.device | None) -> dict[str, Slots]:
    """Return zeroed accumulators for every parameter of a task vector.

    Args:
        vector: The first task vector.
        dtypes: Which accumulators.
        device: Where they go; None is where each parameter is.
    """
    slots: dict[str, Slots] = {}
    for name in vector:
        tensor = vector[name]
        slots[name] = {
            slot: torch.zeros(tensor.shape, dtype=dtype or accumulator_dtype(tensor), device=device or tensor.device)
            for slot, dtype in dtypes.items()
        }
    return slots


def copied(slots: dict[str, Slots], device: torch.device | None = None) -> dict[str, Slots]:
    """Return copies of all accumulators, on the same device or another.

    Args:
        slots: Accumulators by parameter name.
        device: Where the copies go; None is where the originals are.
    """
    return {
        name: {slot: tensor.detach().to(device or tensor.device, copy=True) for slot, tensor in accumulators.items()}
        for name, accumulators in slots.items()
    }


def widen(slots: dict[str, Slots], dtypes: SlotDtypes) -> None:
    """Give integer accumulators the dtype they need now, in place.

    Args:
        slots: Accumulators by parameter name.
        dtypes: What the rule asks for at the present number of tasks.
    """
    for accumulators in slots.values():
        for slot, dtype in dtypes.items():
            if dtype is not None and accumulators[slot].dtype != dtype:
                accumulators[slot] = accumulators[slot].to(dtype)


def float_dtype(slots: Slots) -> torch.dtype:
    """Return the dtype of the floating accumulators of one parameter."""
    return next(tensor.dtype for tensor in slots.values() if tensor.is_floating_point())


def device_of(slots: Slots) -> torch.device:
    """Return where the accumulators of one parameter are."""
    return next(iter(slots.values())).device


def slot_blocks(slots: Slots, *others: Tensor) -> Iterator[tuple[Slots, tuple[Tensor, ...]]]:
    """Walk over the accumulators of one parameter, and over tensors of its shape, in flat pieces.

    Args:
        slots: Contiguous accumulators; the pieces are views of them.
        others: Further tensors of the same shape and device.

    Yields:
        The pieces of the accumulators by slot name, and those of the others.

    Example:
        >>> slots = {"sum": torch.zeros(2, 2)}
        >>> for piece, (tau,) in slot_blocks(slots, torch.ones(2, 2)):
        ...     total = piece["sum"].add_(tau)
        >>> slots["sum"].tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    flat = [tensor.view(-1) for tensor in slots.values()] + [tensor.reshape(-1) for tensor in others]
    for pieces in blocks(*flat):
        yield dict(zip(slots, pieces, strict=False)), pieces[len(slots) :]
