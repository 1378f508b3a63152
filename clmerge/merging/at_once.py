"""Handle many small parameters at once where a device wants that: on a GPU, whose kernels wait for each other."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from clmerge.merging.accumulators import Slots, floating
from clmerge.merging.blocks import entries_at_once
from clmerge.merging.gathered import gathered
from clmerge.merging.vectors import Pack, packs


class Joined(Iterable[Tensor]):
    """Flat tensors, small ones concatenated where their device wants that; made anew whenever they are iterated over.

    Args:
        flat: Tensors of shape ``(numel,)``.

    Example:
        >>> [len(piece) for piece in Joined([torch.ones(2), torch.ones(3)])]
        [2, 3]
    """

    def __init__(self, flat: Sequence[Tensor]) -> None:
        self._flat = {str(place): tensor for place, tensor in enumerate(flat)}
        self._packs = device_packs(self._flat)

    def __iter__(self) -> Iterator[Tensor]:
        return (concatenated([self._flat[name] for name in pack.names]) for pack in self._packs)


def device_packs(tensors: Mapping[str, Tensor]) -> list[Pack]:
    """Group parameters of one dtype that their device takes at once; on a CPU each is by itself, in the given order.

    Args:
        tensors: The parameters by name.
    """
    by_device: dict[torch.device, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        by_device.setdefault(tensor.device, {})[name] = tuple(tensor.shape)
    found: list[Pack] = []
    for device, shapes in by_device.items():
        size = entries_at_once(device)
        alone = (Pack({name: shape}) for name, shape in shapes.items())
        found.extend(packs(shapes, lambda name: tensors[name].dtype, size) if size else alone)
    return found


def concatenated(tensors: Sequence[Tensor]) -> Tensor:
    """Return the entries of several tensors, flat, one tensor after the other; a view if there is one tensor."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def packed_slots(slots: dict[str, Slots]) -> list[tuple[Pack, Slots]]:
    """Group the accumulators that their device takes at once, so that one call changes those of many parameters.

    Args:
        slots: Accumulators by parameter name. Those of a group are laid out next to each other, in place of the
            tensors that are given, unless they lie so already.

    Returns:
        The groups, and their accumulators as flat tensors, which share memory with those by parameter.

    Example:
        >>> slots = {"w": {"sum": torch.zeros(2, 2)}, "b": {"sum": torch.zeros(2)}}
        >>> [(pack.names, list(flat)) for pack, flat in packed_slots(slots)]
        [(['w'], ['sum']), (['b'], ['sum'])]
    """
    found = []
    for pack in device_packs({name: floating(accumulators) for name, accumulators in slots.items()}):
        flat: Slots = {}
        for slot in slots[pack.names[0]]:
            held = [slots[name][slot] for name in pack.names]
            whole = _adjacent(held)
            if whole is None:
                whole = concatenated(held)
                for name, part in pack.parts(whole).items():
                    slots[name][slot] = part
            flat[slot] = whole
        found.append((pack, flat))
    return found


def _adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return one flat view of tensors that lie next to each other in one storage; None if they do not."""
    if len(tensors) == 1:
        return tensors[0].view(-1)
    filled = [tensor for tensor in tensors if tensor.numel()] or tensors[:1]
    first = filled[0]
    place = first.data_ptr()
    for tensor in filled:
        if tensor.data_ptr() != place or not tensor.is_contiguous():
            return None
        place += tensor.numel() * tensor.element_size()
    numel = sum(tensor.numel() for tensor in filled)
    within = (first.storage_offset() + numel) * first.element_size() <= first.untyped_storage().nbytes()
    return first.as_strided((numel,), (1,)) if within else None


def largest_magnitudes(tensors: Sequence[Tensor]) -> list[float]:
    """Return the largest magnitude of every tensor, infinity if it is not finite, 0 if it is empty.

    Args:
        tensors: Any shapes, floating-point.

    Example:
        >>> largest_magnitudes([torch.tensor([1.0, -3.0]), torch.tensor([float("nan")]), torch.empty(0)])
        [3.0, inf, 0.0]
    """
    held = [place for place, tensor in enumerate(tensors) if tensor.numel()]
    together = [place for place in held if entries_at_once(tensors[place].device)]
    apart = [place for place in held if not entries_at_once(tensors[place].device)]
    # On a CPU the norm takes twenty times as long as both limits. NaN shows in all three.
    limits = [torch.stack(torch.aminmax(tensors[place].detach())) for place in apart]
    norms = torch._foreach_norm([tensors[place].detach() for place in together], math.inf) if together else ()
    numbers = gathered([*limits, *(norm.reshape(1) for norm in norms)]).abs()
    first = numbers[: 2 * len(apart)].view(-1, 2).amax(1)
    magnitudes = torch.cat([first, numbers[2 * len(apart) :]]).nan_to_num(nan=math.inf, posinf=math.inf).tolist()
    found = dict(zip([*apart, *together], magnitudes, strict=True))
    return [found.get(place, 0.0) for place in range(len(tensors))]
