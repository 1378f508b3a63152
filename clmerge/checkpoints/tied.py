"""Find tied weights: several names of one tensor, which is merged once."""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from clmerge.checkpoints.reader import Checkpoint

_PROBE = 64  # bytes at either end that are compared before the whole tensors


def resolve_ties(base: Checkpoint, models: Sequence[Checkpoint]) -> dict[str, str]:
    """Find the names that are one tensor in the base and in every model.

    If a model stores such a tensor under only one of its names, as in Hugging Face's format, the other names are added
    to the model.

    Args:
        base: The base model.
        models: The models; names are added to them.

    Returns:
        For every further name of a tensor, the name under which the tensor is merged.
    """
    found = twins(base)
    for model in models:
        for name, kept in model.aliases.items():
            if name in base.entries and name not in model.entries:
                model.add_name(name, kept)
        if found:
            own = {} if model.rest_is_zero else twins(model)
            found = {name: leader for name, leader in found.items() if _agree(model, own, name, leader)}
    groups = [[leader, *(name for name in found if found[name] == leader)] for leader in dict.fromkeys(found.values())]
    for model in models:
        for group in groups:
            present = [name for name in group if name in model.entries]
            for name in group:
                if present and name not in present:
                    model.add_name(name, present[0])
    return found


def untie(base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    """Add the further names of the base's tensors under which a model has another tensor, such as an untied head.

    Args:
        base: The base model; names are added to it.
        models: The models.
    """
    for name, kept in base.aliases.items():
        if name not in base.entries and any(_is_untied(model, name, kept) for model in models):
            base.add_name(name, kept)


def twins(checkpoint: Checkpoint) -> dict[str, str]:
    """Return every name that holds the same tensor as an earlier name, mapped to that name.

    In a file that ``torch.save`` wrote, two names hold the same tensor if they share memory. In formats that store
    every tensor separately, they do if all bits are equal, except for vectors and constants, which can also be equal
    in untied layers.

    Args:
        checkpoint: An open checkpoint.
    """
    found: dict[str, str] = {}
    by_memory: dict[object, str] = {}
    by_probe: dict[object, list[str]] = {}
    for name, entry in checkpoint.entries.items():
        memory = checkpoint.memory(name)
        if memory is not None and (leader := by_memory.setdefault(memory, name)) != name:
            found[name] = leader
        elif len(entry.shape) > 1 and entry.numel > 1:
            ends = checkpoint.ends(name, _PROBE)
            by_probe.setdefault((entry.shape, entry.dtype, ends), []).append(name)
    for names in by_probe.values():
        leaders: list[str] = []
        for name in names:
            tensor = checkpoint.tensor(name) if len(names) > 1 else None
            if tensor is None or _is_constant(tensor):
                continue
            same = next((leader for leader in leaders if same_bits(checkpoint.tensor(leader), tensor)), None)
            if same is None:
                leaders.append(name)
            else:
                found[name] = same
    return {name: found.get(leader, leader) for name, leader in found.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one shape and dtype have the same bits, NaN and signs of zeros included."""
    return torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _is_constant(tensor: Tensor) -> bool:
    rows = tensor.reshape(prod(tensor.shape[:1]), -1)
    return same_bits(rows, rows[:1, :1].expand_as(rows))


def _is_untied(model: Checkpoint, name: str, kept: str) -> bool:
    both = name in model.entries and kept in model.entries
    return both and (
        model.entries[name] != model.entries[kept] or not same_bits(model.tensor(name), model.tensor(kept))
    )


def _agree(model: Checkpoint, own: Mapping[str, str], name: str, leader: str) -> bool:
    both = name in model.entries and leader in model.entries
    return not both or own.get(name, name) == own.get(leader, leader)
