"""ZipLoRA: coefficients per task and input column, learned to keep what every expert puts out."""

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.learned.learned import Learned, Moment, weighted
from clmerge.merging.objectives import FeatureMatch, Objective
from clmerge.merging.orientation import outputs_first


class ZipMerge(Learned):
    """Learn a coefficient for every input column of every matrix of each task (Shah et al., arXiv 2311.13600).

    The merged model is to put out what each task's expert does on images of its task, while the columns that tasks use
    overlap little: ``overlap`` times the mean of ``|m_i m_j|`` is added for every pair of tasks and matrix. Parameters
    of other than two dimensions are summed. The paper merges two LoRA adapters of a diffusion model; here there are any
    number of tasks and modes of tuning.

    Args:
        overlap: Weight of the overlap in the loss.
        steps: Optimizer steps after every task.
        lr: Learning rate of Adam.
        objective: What is minimised. Default: ``FeatureMatch(power=2)``.
        seed: Seed of the order of the images.

    Raises:
        ValueError: If a setting is out of range.
    """

    name = "zip_merge"
    summary = "sum of the task vectors with coefficients learned per input column"
    source = "2311.13600"

    def __init__(
        self,
        *,
        overlap: float = 0.01,
        steps: int = 100,
        lr: float = 1e-3,
        objective: Objective | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(objective=objective or FeatureMatch(power=2), steps=steps, lr=lr, seed=seed)
        if overlap < 0:
            raise ValueError(f"expected an overlap of 0 or more, got {overlap}")
        self.overlap = overlap
        self.objective = objective

    @override
    def _start(self, name: str, shape: tuple[int, ...], num_tasks: int) -> dict[str, Tensor]:
        if len(shape) != 2:
            return {}
        inputs = outputs_first(name, torch.empty(shape, device="meta")).shape[1]
        return {name: torch.ones(num_tasks, inputs, dtype=torch.float64)}

    @override
    def _combine(self, name: str, taus: list[Tensor], coefficients: Mapping[str, Tensor], moment: Moment) -> Tensor:
        if (columns := coefficients.get(name)) is None:
            return weighted(taus, torch.ones(len(taus)))
        return outputs_first(name, weighted([outputs_first(name, tau) for tau in taus], columns))

    @override
    def _penalty(self, coefficients: Mapping[str, Tensor]) -> Tensor | None:
        pairs = [
            (m[i] * m[j]).abs().mean()
            for m in coefficients.values()
            for i, j in itertools.combinations(range(len(m)), 2)
            if m.numel()
        ]
        return self.overlap * torch.stack(pairs).sum() if pairs and self.overlap else None
