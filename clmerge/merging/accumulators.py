"""The accumulators of a merger: for each parameter, a few tensors of the same shape, by slot name."""

from collections.abc import Iterator

import torch
from torch import Tensor

from clmerge.merging.blocks import blocks
from clmerge.weights.task_vector import State, accumulator_dtype

Slots = dict[str, Tensor]
"""The accumulators of one parameter, by slot name."""

SlotDtypes = dict[str, torch.dtype | None]
"""Dtype of each accumulator, by slot name; None means float32, or float64 for float64 vectors."""


def allocate(vector: State, dtypes: SlotDtypes, device: torch.device | None) -> dict[str, Slots]:
    """Return zeroed accumulators for every parameter of a task vector.

    Args:
        vector: The first task vector.
        dtypes: Dtype of each accumulator, by slot name.
        device: Device of the accumulators; None means the device of each parameter.
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
        device: Device of the copies; None means the device of the originals.
    """
    return {
        name: {slot: tensor.detach().to(device or tensor.device, copy=True) for slot, tensor in accumulators.items()}
        for name, accumulators in slots.items()
    }


def widen(slots: dict[str, Slots], dtypes: SlotDtypes) -> None:
    """Convert integer accumulators in place to the dtype needed for the current number of tasks.

    Args:
        slots: Accumulators by parameter name.
        dtypes: Dtypes that the rule declares for the current number of tasks.
    """
    for accumulators in slots.values():
        for slot, dtype in dtypes.items():
            if dtype is not None and accumulators[slot].dtype != dtype:
                accumulators[slot] = accumulators[slot].to(dtype)


def float_dtype(slots: Slots) -> torch.dtype:
    """Return the dtype of the floating accumulators of one parameter."""
    return floating(slots).dtype


def floating(slots: Slots) -> Tensor:
    """Return the first floating accumulator of one parameter."""
    return next(tensor for tensor in slots.values() if tensor.is_floating_point())


def device_of(slots: Slots) -> torch.device:
    """Return the device of the accumulators of one parameter."""
    return next(iter(slots.values())).device


def slot_blocks(slots: Slots, *others: Tensor) -> Iterator[tuple[Slots, tuple[Tensor, ...]]]:
    """Iterate over the accumulators of one parameter, and over tensors of its shape, in flat pieces.

    Args:
        slots: Contiguous accumulators; the pieces are views of them.
        others: Further tensors of the same shape and device.

    Yields:
        The pieces of the accumulators by slot name, and the pieces of ``others``.

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
