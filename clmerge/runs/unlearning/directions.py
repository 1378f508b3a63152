"""The vectors that are subtracted from a merged model to forget tasks."""

from collections.abc import Sequence

import torch

from clmerge.merging import Ethos, ExtSub
from clmerge.runs.stored_run import StoredRun
from clmerge.seeds import seeded_generator
from clmerge.weights.task_vector import State, TaskVector


def moved(run: StoredRun, task: int) -> TaskVector:
    """Return what the training of a task has moved, as far as the run knows.

    That is the task vector; where the task started from the weights of the one before (``start_policy: previous``), the
    difference of both vectors, because the vector holds what was learned before, too.

    Args:
        run: The run.
        task: Index of the task.
    """
    tau = run.bank[task]
    if run.config["learner"]["start_policy"] != "previous" or not task:
        return tau
    before = run.bank[task - 1]
    return {name: tensor - before[name] for name, tensor in tau.items()}


def total(vectors: Sequence[State]) -> TaskVector:
    """Return the sum of vectors: what ``negate`` subtracts."""
    return {name: torch.stack([vector[name] for vector in vectors]).sum(dim=0) for name in vectors[0]}


def deficiency(merged: State, vectors: Sequence[State]) -> TaskVector:
    """Return the part of vectors that a merged vector does not share with them: what ``ext_sub`` subtracts.

    Args:
        merged: The merged vector, in the place of the expert.
        vectors: The vectors to forget, in the place of the anti-experts.
    """
    rule = ExtSub(strength=1.0)
    for vector in (merged, *vectors):
        rule.update(vector)
    return {name: merged[name] - tensor.to(merged[name].dtype) for name, tensor in rule.compute().items()}


def large_part(base: State, merged: State, vectors: Sequence[State]) -> TaskVector:
    """Return the part of vectors that is large in the basis of the merged weights: what ``ethos`` subtracts.

    Args:
        base: theta_0.
        merged: The merged vector, in the place of the auxiliary task that is kept.
        vectors: The vectors to forget.
    """
    weights = {name: tensor + merged[name].to(tensor.dtype) for name, tensor in base.items() if name in merged}
    rule = Ethos(strength=1.0)
    for vector in vectors:
        rule.update(vector, statistics={"weights": weights})
    return {name: -tensor for name, tensor in rule.compute().items()}


def random_like(vector: State, *, seed: int) -> TaskVector:
    """Return Gaussian noise with the norm of every parameter of a vector: the baseline of the negation study.

    Args:
        vector: The vector.
        seed: Seed of the noise.
    """
    found = {}
    for name, tensor in vector.items():
        generator = seeded_generator(seed=seed, task=0, name=name, purpose="random_vector")
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        length = float(noise.norm())
        found[name] = (noise * (float(tensor.double().norm()) / (length or 1.0))).to(tensor.dtype)
    return found


def minus(merged: State, coefficient: float, direction: State) -> TaskVector:
    """Return a merged vector less a multiple of a direction.

    Example:
        >>> minus({"w": torch.tensor([3.0])}, 0.5, {"w": torch.tensor([2.0])})
        {'w': tensor([2.])}
    """
    return {name: tensor - coefficient * direction[name].to(tensor.dtype) for name, tensor in merged.items()}
