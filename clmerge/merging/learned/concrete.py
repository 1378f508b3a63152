"""Concrete masks: one learned mask for all task vectors, relaxed from a binary one."""

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.learned.learned import Learned, Moment, weighted
from clmerge.merging.objectives import Entropy, Objective
from clmerge.seeds import seeded_uniform


class ConcreteMask(Learned):
    """Learn which entries of the task vectors to keep, one mask for all tasks (Tang et al., arXiv 2312.06173).

    While it is learned, the mask is ``sigmoid((x + log(u) - log(1 - u)) / temperature)`` with u uniform, divided by its
    mean over the parameter; the sum of the task vectors times the mask, times ``scale``, is added to theta_0. The
    released code merges under one such random mask, so that results depend on its seed. Here the merged model has the
    mask without noise, ``sigmoid(x / temperature)``.

    The dearest of the learned rules: x is as large as the model, Adam's moments are twice that while it learns.

    Args:
        scale: Scaling coefficient.
        learn_scale: Learn a coefficient per task and parameter tensor as well, from ``scale`` on (the paper's Concrete
            AdaMerging). The paper alternates the two levels, here they take every step together.
        temperature: Temperature of the relaxation.
        steps: Optimizer steps after every task; the paper takes 2,000 once.
        lr: Learning rate of Adam.
        objective: What is minimised. Default: ``Entropy()`` over the classes of each image's task.
        seed: Seed of the order of the images and of the noise.

    Raises:
        ValueError: If a setting is out of range.
    """

    name = "concrete"
    summary = "sum of the task vectors under one learned mask"
    source = "2312.06173"

    def __init__(
        self,
        scale: float = 0.3,
        *,
        learn_scale: bool = False,
        temperature: float = 0.5,
        steps: int = 500,
        lr: float = 1e-3,
        objective: Objective | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(objective=objective or Entropy(), steps=steps, lr=lr, seed=seed)
        if temperature <= 0:
            raise ValueError(f"expected a temperature above 0, got {temperature}")
        self.scale = scale
        self.learn_scale = learn_scale
        self.temperature = temperature
        self.objective = objective

    @override
    def _start(self, name: str, shape: tuple[int, ...], num_tasks: int) -> dict[str, Tensor]:
        scale = torch.full((num_tasks,), self.scale, dtype=torch.float64)
        return {f"mask {name}": torch.zeros(shape), **({f"scale {name}": scale} if self.learn_scale else {})}

    @override
    def _combine(self, name: str, taus: list[Tensor], coefficients: Mapping[str, Tensor], moment: Moment) -> Tensor:
        scale = torch.full((len(taus),), self.scale, dtype=torch.float64)
        total = weighted(taus, coefficients.get(f"scale {name}", scale))
        x = coefficients[f"mask {name}"].to(total)
        if moment.step is not None:
            purpose = f"concrete {moment.step}"
            uniform = seeded_uniform(total, seed=self.seed, task=moment.task, name=name, purpose=purpose)
            x = x + torch.logit(uniform, eps=1e-6).to(total)
        return total * rescaled_mask(x, self.temperature)


def rescaled_mask(x: Tensor, temperature: float) -> Tensor:
    """Return a relaxed mask of mean 1.

    Args:
        x: Logits, with or without noise.
        temperature: Temperature of the relaxation.

    Example:
        >>> rescaled_mask(torch.logit(torch.tensor([0.1, 0.5, 0.9])), 0.5)
        tensor([0.0244, 1.0000, 1.9756])
    """
    mask = torch.sigmoid(x / temperature)
    return mask / mask.mean() if mask.numel() else mask
