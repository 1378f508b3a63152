"""Losses of a vector that is added to theta_0, and their gradients as a run would give them to a rule that learns."""

import torch


def gradients_of(loss):
    """Return gradients of ``loss(vector, objective, tasks)``, a function of the vector that is added to theta_0."""

    def gradients(objective, tasks, *, seed, expert):
        def gradient(vector):
            with torch.enable_grad():
                leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in vector.items()}
                value = loss(leaves, objective, tasks)
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
            slopes = {name: slope for name, slope in zip(leaves, found, strict=True) if slope is not None}
            return float(value.detach()), slopes

        return gradient

    return gradients


def learn(merger, vectors, loss, tasks=None):
    """Fold vectors in, and learn by a loss after each."""
    for index, vector in enumerate(vectors):
        task = None if tasks is None else tasks[index]
        merger.update(vector, task=task, gradients=gradients_of(loss))
    return merger


def doubles(**entries):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in entries.items()}


def distance(target):
    """Return half the squared distance of a parameter ``w`` from a target, as a loss."""
    wanted = torch.tensor(target, dtype=torch.float64)
    return lambda vector, objective, tasks: (vector["w"] - wanted).square().sum() / 2
