"""Identities of task vectors, by which an accumulator recognises a vector it has merged before."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from clmerge.merging.at_once import largest_magnitudes
from clmerge.merging.checks import check_finite
from clmerge.merging.gathered import gathered
from clmerge.merging.step import Statistics
from clmerge.weights.task_vector import CheckedVector, State

_SAMPLED = 1024  # entries hashed per tensor: no two training runs agree in all of them


class Examined(NamedTuple):
    """Results of one pass over a task vector.

    Attributes:
        identity: Hash by which an accumulator recognises the vector.
        largest: Largest magnitude of each parameter.
    """

    identity: str
    largest: dict[str, float]


def examine(vector: State) -> Examined:
    """Return the identity of a task vector and its largest magnitudes; raise an error if it is not finite.

    The identity is a SHA-256 over names, shapes and up to 1024 evenly spaced entries of every tensor, by value: the
    same on every device and in every dtype that holds the values. It distinguishes vectors but does not detect damaged
    files; ``clmerge.weights.fingerprint``, which reads every byte, does.

    Args:
        vector: The task vector; the result for a ``CheckedVector`` is computed once and cached.

    Raises:
        ValueError: If a tensor holds NaN or Inf; the message names the first.

    Example:
        >>> import torch
        >>> examine({"w": torch.ones(2)}) == examine({"w": torch.ones(2, dtype=torch.bfloat16)})
        True
        >>> examine({"w": torch.tensor([1.0, -3.0])}).largest
        {'w': 3.0}
    """
    if not isinstance(vector, CheckedVector):
        return _examine(vector)
    if vector.examined is None:
        vector.examined = _examine(vector)
    found: Examined = vector.examined
    return found


def with_statistics(identity: str, statistics: Statistics) -> str:
    """Return the joint identity of a task vector and its statistics.

    Args:
        identity: Identity of the vector.
        statistics: The task's statistics that the rule reads.
    """
    if not statistics:
        return identity
    digest = hashlib.sha256(identity.encode())
    for name in sorted(statistics):
        value = statistics[name]
        found = _sampled(value) if isinstance(value, Mapping) else float(value).hex()
        digest.update(f"\n{name} {found}".encode())
    return digest.hexdigest()


def _examine(vector: State) -> Examined:
    names = sorted(vector)
    largest = dict(zip(names, largest_magnitudes([vector[name] for name in names]), strict=True))
    if math.inf in largest.values():
        check_finite(vector)
    return Examined(_sampled(vector), largest)


def _sampled(state: State) -> str:
    """Hash names, shapes and a sample of the entries of every tensor."""
    digest = hashlib.sha256()
    samples: list[Tensor] = []
    for name in sorted(state):
        flat = state[name].detach().reshape(-1)
        digest.update(json.dumps([name, list(state[name].shape)]).encode() + b"\n")
        samples.append(flat[:: -(-max(flat.numel(), 1) // _SAMPLED)])
    digest.update((gathered(samples) + 0.0).numpy().data)  # adding zero turns -0.0 into 0.0
    return digest.hexdigest()
