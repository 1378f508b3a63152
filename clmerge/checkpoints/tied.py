"""Tied weights: names of one tensor, which are merged once."""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from clmerge.checkpoints.reader import Checkpoint

_PROBE = 64  # bytes at either end that are compared before all are


def resolve_ties(base: Checkpoint, models: Sequence[Checkpoint]) -> dict[str, str]:
    """Find the names of the base that mean one tensor in every model, too.

    A model that stores such a tensor under one of its names only, as Hugging Face's format does, is told to give it
    under the others.

    Args:
        base: The base model.
        models: The models; names are added to them.

    Returns:
        The name to merge by every name that goes with it.
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


def twins(checkpoint: Checkpoint) -> dict[str, str]:
    """Return every name that holds the same tensor as an earlier one, with that one.

    The same tensor is one memory in a file that ``torch.save`` wrote. Formats that keep every tensor by itself show it
    by equal bits; vectors and constants, which are equal in untied layers as well, do not count.

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


def _agree(model: Checkpoint, own: Mapping[str, str], name: str, leader: str) -> bool:
    both = name in model.entries and leader in model.entries
    return not both or own.get(name, name) == own.get(leader, leader)
