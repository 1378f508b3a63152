"""Random numbers that depend only on (seed, task, parameter name), not on order, device, rank or resume."""

import hashlib

import torch
from torch import Tensor


def seeded_uniform(tau: Tensor, *, seed: int, task: int, name: str, purpose: str) -> Tensor:
    """Draw one uniform number in [0, 1) for every entry of a parameter.

    The numbers are drawn on the CPU and moved, so that every device gets the same ones.

    Args:
        tau: The parameter's tensor; only its shape and device are used.
        seed: The rule's seed.
        task: Index of the task.
        name: Name of the parameter.
        purpose: Label of the use; rules with the same seed and different purposes get different numbers.

    Returns:
        float32 of ``tau``'s shape on its device.

    Example:
        >>> u = seeded_uniform(torch.zeros(2), seed=0, task=1, name="w", purpose="drop")
        >>> torch.equal(u, seeded_uniform(torch.zeros(2), seed=0, task=1, name="w", purpose="drop"))
        True
    """
    generator = seeded_generator(seed=seed, task=task, name=name, purpose=purpose)
    return torch.rand(tau.shape, generator=generator).to(tau.device)


def seeded_generator(*, seed: int, task: int, name: str, purpose: str) -> torch.Generator:
    """Return a generator on the CPU that belongs to one use of random numbers.

    Args:
        seed: The rule's seed.
        task: Index of the task, or their number.
        name: Name of the parameter, or of what is drawn.
        purpose: Label of the use.
    """
    digest = hashlib.sha256(f"{purpose}/{seed}/{task}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
