"""Gradient descent on the gates of a routed model alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clmerge.deploy.routing.experts import Experts
from clmerge.deploy.routing.mixture import Gates, LayerGate
from clmerge.deploy.routing.routed_model import RoutedModel
from clmerge.distributed import of_rank_zero
from clmerge.merging.objectives import Given, Objective, Outputs


def descend(
    loss: Callable[[int], Tensor],
    parameters: Sequence[nn.Parameter],
    *,
    steps: int,
    lr: float,
    after: Callable[[], None] | None = None,
) -> None:
    """Minimise a loss by Adam, in place; every process ends with the result of rank zero.

    Gradients of other parameters are neither computed nor touched.

    Args:
        loss: Returns the loss at a step.
        parameters: What is trained.
        steps: Number of steps.
        lr: Learning rate.
        after: Called after every step.

    Raises:
        ValueError: If the loss is not finite.
    """
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr)
    with torch.enable_grad():
        for step in range(steps):
            value = loss(step)
            if not math.isfinite(float(value.detach())):
                raise ValueError(
                    f"expected a finite loss of the gates, got {float(value.detach())} at step {step + 1}; lower lr"
                )
            for parameter, grad in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
                parameter.grad = grad
            optimizer.step()
            if after is not None:
                after()
    with torch.no_grad():
        for parameter, value in zip(parameters, of_rank_zero([one.detach().cpu() for one in parameters]), strict=True):
            parameter.requires_grad_(False).copy_(value)
            parameter.grad = None


def objective_loss(
    model: RoutedModel,
    objective: Objective,
    images: Tensor,
    labels: Tensor | None,
    classes: Sequence[int],
    seen: Sequence[int],
    expert: Outputs | None = None,
) -> Tensor:
    """Return an objective of a routed model on images of one task.

    Args:
        model: The model.
        objective: The objective, which may not look at features of the model.
        images: ``(B, channels, height, width)``.
        labels: Global class ids, where labels may be seen.
        classes: Classes of the task.
        seen: Classes of all tasks so far.
        expert: Outputs of the task's expert, where the objective needs them.
    """
    device = next(model.parameters()).device
    logits = model(images.to(device))
    own, all_seen = (torch.tensor(sorted(set(ids)), device=device) for ids in (classes, seen))
    given = Given(own, all_seen, None if labels is None else labels.to(device), expert)
    return objective(Outputs(logits, torch.empty(0, device=device)), given)


@contextmanager
def on(model: RoutedModel, device: torch.device) -> Iterator[None]:
    """Run a block with a model on a device; it is on the CPU afterwards."""
    model.to(device)
    try:
        yield
    finally:
        model.cpu()


def gates_by_block(experts: Experts, router: Callable[[int], LayerGate]) -> dict[str, Gates]:
    """Return gates that the layers of one block share; the first of them computes them from what it reads.

    Args:
        experts: Experts of one task by layer, in the model's order.
        router: Returns the router of a block for the width that its first layer reads.
    """
    blocks: dict[str, Gates] = {}
    found = {}
    for layer, expert in experts.items():
        block = layer.rpartition(".")[0]
        if block not in blocks:
            blocks[block] = Gates(router(expert.a.shape[1]), layer)
        found[layer] = blocks[block]
    return found
