"""Adam's second moments: a precision estimate that training provides without another pass over the data."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adamax, Optimizer

from clmerge.weights.task_vector import accumulator_dtype


def require_second_moments(optimizers: Iterable[Optimizer], parameters: Mapping[str, Tensor]) -> None:
    """Check, before or after a step, that Adam trains every parameter directly.

    Args:
        optimizers: The optimizers that train the model.
        parameters: The live parameters of the model by name.

    Raises:
        ValueError: If a parameter is trained by no optimizer, as in low-rank modes of tuning, or by another than Adam.
    """
    groups = _groups(optimizers)
    for name, parameter in parameters.items():
        if parameter not in groups:
            raise ValueError(
                f"expected an optimizer that trains {name!r} itself, for Adam's second moments, got none: modes of "
                "tuning such as LoRA train other parameters in its place. Use statistic 'fisher', which is measured "
                "on the weights, or tune the weights themselves (Full, Partial)"
            )
        optimizer, group = groups[parameter]
        state = optimizer.state.get(parameter, {})
        # beta2: a group of Adam that has trained nothing yet has no state, but it has betas.
        if "betas" not in group or isinstance(optimizer, Adamax) or (state and "exp_avg_sq" not in state):
            raise ValueError(
                f"expected an optimizer with Adam's second moments for {name!r}, got {type(optimizer).__name__}; train "
                "it with AdamW, or use statistic 'fisher', which needs no certain optimizer"
            )


def adam_second_moments(optimizers: Iterable[Optimizer], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the running mean of squared gradients from the optimizers that trained a model.

    A substitute for the diagonal Fisher information, as in continual merging by optimizer states (arXiv 2509.23592):
    ``v / (1 - beta2^step)``, with the true labels. The gradients are means over batches, so the result is smaller than
    the Fisher by about the batch size, and it reflects the last ``1 / (1 - beta2)`` steps. Rules that compare tasks
    need the same batch size and optimizer for all of them.

    Args:
        optimizers: Adam, AdamW, NAdam, RAdam and others that keep ``exp_avg_sq`` in the shape of the parameter.
        parameters: The live parameters of the model by name.

    Returns:
        Second moments by name, at least float32, on the optimizer's device; zeros for a parameter that never had a
        gradient.

    Raises:
        ValueError: If a parameter is trained by no such optimizer.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.Adam([weight])
        >>> (weight * torch.tensor([1.0, 3.0])).sum().backward()
        >>> optimizer.step()
        >>> adam_second_moments([optimizer], {"w": weight})["w"].round(decimals=3)
        tensor([1., 9.])
    """
    optimizers = list(optimizers)
    require_second_moments(optimizers, parameters)
    groups = _groups(optimizers)
    moments = {}
    for name, parameter in parameters.items():
        optimizer, group = groups[parameter]
        state = optimizer.state.get(parameter, {})
        if not state:
            moments[name] = torch.zeros_like(parameter, dtype=accumulator_dtype(parameter)).detach()
            continue
        second = state["exp_avg_sq"].detach()
        correction = 1 - group["betas"][1] ** float(state["step"])
        moments[name] = second.to(accumulator_dtype(second)) / correction
    return moments


def _groups(optimizers: Iterable[Optimizer]) -> dict[Tensor, tuple[Optimizer, dict[str, Any]]]:
    return {parameter: (o, group) for o in optimizers for group in o.param_groups for parameter in group["params"]}
