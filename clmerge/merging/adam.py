"""Adam's second moments: a precision that training leaves behind, for which no data is looked at again."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from clmerge.weights.task_vector import accumulator_dtype


def adam_second_moments(optimizers: Iterable[Optimizer], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the running mean of squared gradients from the optimizers that trained a model.

    A stand-in for the diagonal Fisher information, as in continual merging by optimizer states (arXiv 2509.23592):
    ``v / (1 - beta2^step)``, with the true labels. The gradients are means over batches, so it is smaller than the
    Fisher by about the batch size, and it tells of the last ``1 / (1 - beta2)`` steps. Rules that compare tasks want
    the same batch size and optimizer for all of them.

    Args:
        optimizers: Adam, AdamW, NAdam, RAdam and others that keep ``exp_avg_sq`` in the shape of the parameter.
        parameters: The live parameters of the model by name.

    Returns:
        Second moments by name, at least float32, where the optimizer has them; zeros for a parameter that never had
        a gradient.

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
    groups = {parameter: (o, group) for o in optimizers for group in o.param_groups for parameter in group["params"]}
    moments = {}
    for name, parameter in parameters.items():
        optimizer, group = groups.get(parameter, (None, {}))
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        # beta2: a group of Adam that has trained nothing yet has no state, but it has betas.
        if optimizer is None or "betas" not in group or (state and "exp_avg_sq" not in state):
            found = "none" if optimizer is None else type(optimizer).__name__
            raise ValueError(
                f"expected an optimizer with Adam's second moments for {name!r}, got {found}; train it with AdamW, or "
                "use a rule that requires another statistic"
            )
        if not state:
            moments[name] = torch.zeros_like(parameter, dtype=accumulator_dtype(parameter)).detach()
            continue
        second = state["exp_avg_sq"].detach()
        correction = 1 - group["betas"][1] ** float(state["step"])
        moments[name] = second.to(accumulator_dtype(second)) / correction
    return moments
