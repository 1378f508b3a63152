"""Swap other weights into a model and restore its own; for plain tensors and DTensors."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from clmerge.weights.selection import COMPILE_PREFIX


def named_tensors(module: nn.Module, names: Iterable[str], *, origin: str) -> dict[str, Tensor]:
    """Return parameters and buffers by name, with ``torch.compile``'s ``_orig_mod.`` removed from the names.

    Args:
        module: The module.
        names: Names of the tensors.
        origin: Source of the names, for the error message.

    Raises:
        RuntimeError: If a name is missing from the module.
    """
    names = list(names)
    own = own_tensors(module)
    check_present(module, own, names, origin=origin)
    return {name: own[name] for name in names}


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name, with ``torch.compile``'s ``_orig_mod.`` removed from the names."""
    # After a forward without gradients the root of an FSDP2 model stays gathered and returns plain tensors.
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    both = (*module.named_parameters(), *module.named_buffers())
    return {name.replace(COMPILE_PREFIX, ""): tensor for name, tensor in both}


def check_present(module: nn.Module, found: Container[str], names: Sequence[str], *, origin: str) -> None:
    """Raise a RuntimeError if a module does not have all tensors of ``names``.

    Args:
        module: The module, for the error message.
        found: Names that the module has.
        names: Names that it should have.
        origin: Source of ``names``, for the error message.
    """
    if missing := [name for name in names if name not in found]:
        raise RuntimeError(
            f"expected {type(module).__name__} to have the {len(names)} tensors of {origin}, got a model "
            f"without {len(missing)} of them, the first {missing[0]!r}; use the same architecture, or leave "
            "them out with exclude="
        )


def full_copy(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """Return a detached copy of the whole tensor.

    Args:
        tensor: A tensor; a DTensor is gathered, which is a collective: every rank must call.
        device: Device of the copy; default that of the tensor.
    """
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to(device or whole.device, copy=True)


@torch.no_grad()
def assign(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy in place, so that optimizers and parallel wrappers keep their references.

    Args:
        targets: Tensors of a model by name; they keep their dtype, device and layout.
        values: Tensors to copy, by name; not sharded.

    Raises:
        RuntimeError: If a shape differs; nothing is copied then.
    """
    for name, value in values.items():
        if targets[name].shape != value.shape:
            raise RuntimeError(
                f"expected {name!r} of shape {tuple(value.shape)}, got {tuple(targets[name].shape)} in the "
                "model; the architecture changed since the base was taken"
            )
    for name, value in values.items():
        target = targets[name]
        if isinstance(target, DTensor):
            whole = value.to(device=target.device, dtype=target.dtype)
            target.copy_(distribute_tensor(whole, target.device_mesh, target.placements))
        else:
            target.copy_(value)


class _Swap:
    """The tensors that a swap has taken out of a module."""

    def __init__(self, module: nn.Module, originals: dict[str, Tensor]) -> None:
        self.module = module
        self.originals = originals


_open: list[_Swap] = []


def is_swapped(module: nn.Module) -> bool:
    """Say whether other weights are in the model now, or in what ``torch.compile`` made of it."""
    return any(swap.module is module or getattr(swap.module, "_orig_mod", None) is module for swap in _open)


@contextmanager
def swapped(module: nn.Module, values: Mapping[str, Tensor], *, origin: str = "the merged model") -> Iterator[None]:
    """Run a block with ``values`` in place of the module's tensors of the same names; always restores the originals.

    Swaps of one module may end in any order (Lightning's callback hooks require that): the original of a swap that ends
    before a later swap of the same tensor is restored when the last later one ends.

    Args:
        module: The model.
        values: Parameters and buffers by name, without ``torch.compile``'s ``_orig_mod.``.
        origin: Source of the values, for the error message.

    Raises:
        RuntimeError: If a name is missing from the module, or a shape differs; the module is unchanged then.
    """
    targets = named_tensors(module, values, origin=origin)
    swap = _Swap(module, {name: target.detach().clone() for name, target in targets.items()})
    _open.append(swap)
    try:
        assign(targets, values)
        yield
    finally:
        position = next(index for index, other in enumerate(_open) if other is swap)
        del _open[position]
        later = [other for other in _open[position:] if other.module is module]
        ours = dict(swap.originals)
        for name in swap.originals:
            if above := next((other for other in later if name in other.originals), None):
                above.originals[name] = ours.pop(name)
        with torch.no_grad():
            for name, target in named_tensors(module, ours, origin=origin).items():
                target.copy_(ours[name])
