"""aTLAS: coefficients per task and parameter tensor, learned from zero with labels."""

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.learned.learned import Learned, Moment, weighted
from clmerge.merging.objectives import CrossEntropy, Objective


class ATLAS(Learned):
    """Learn an anisotropic scaling of the task vectors on labelled images (Zhang et al., arXiv 2407.02880).

    A coefficient per task and parameter tensor, unbounded, starts at 0, which is theta_0; weight decay draws it there,
    the right prior where images are few. The paper learns on the validation split that it also selects the epoch on;
    here the number of steps is fixed and the split is the declared adaptation data, which must be labelled.

    Args:
        steps: Optimizer steps after every task.
        lr: Learning rate of AdamW.
        decay: Weight decay of the coefficients.
        objective: What is minimised. Default: ``CrossEntropy()`` over the classes of each image's task.
        seed: Seed of the order of the images.

    Raises:
        ValueError: If a setting is out of range.
    """

    name = "atlas"
    summary = "coefficients per task and parameter tensor, learned from zero with labels"
    source = "2407.02880"
    optimizer = "adamw"

    def __init__(
        self,
        *,
        steps: int = 500,
        lr: float = 1e-3,
        decay: float = 0.1,
        objective: Objective | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(objective=objective or CrossEntropy(), steps=steps, lr=lr, seed=seed)
        if decay < 0:
            raise ValueError(f"expected a decay of 0 or more, got {decay}")
        self.decay = decay
        self.weight_decay = decay
        self.objective = objective

    @override
    def _start(self, name: str, shape: tuple[int, ...], num_tasks: int) -> dict[str, Tensor]:
        return {name: torch.zeros(num_tasks, dtype=torch.float64)}

    @override
    def _combine(self, name: str, taus: list[Tensor], coefficients: Mapping[str, Tensor], moment: Moment) -> Tensor:
        return weighted(taus, coefficients[name])
