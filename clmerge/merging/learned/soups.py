"""Soups with learned weights: averages of the models, whose weights are learned with labels."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.finish.layers import BLOCK
from clmerge.merging.learned.learned import Learned, Moment, Taus, weighted
from clmerge.merging.objectives import CrossEntropy, Objective


class LearnedSoup(Learned):
    """Average the models with weights learned per layer (Wortsman et al., arXiv 2203.05482).

    The weights of every parameter tensor are a softmax over the tasks, so that they are positive and sum to 1. In the
    paper the models are of one task; here they are the experts of the tasks so far. The paper also learns a factor of
    the logits; here these are the model's own.

    Args:
        steps: Optimizer steps after every task; five epochs in the paper.
        lr: Learning rate of AdamW, without weight decay.
        objective: What is minimised. Default: ``CrossEntropy()`` over the classes of each image's task.
        seed: Seed of the order of the images.

    Raises:
        ValueError: If a setting is out of range.
    """

    name = "learned_soup"
    summary = "average of the task vectors with weights learned per layer"
    source = "2203.05482"
    optimizer = "adamw"

    def __init__(
        self, *, steps: int = 200, lr: float = 0.05, objective: Objective | None = None, seed: int = 0
    ) -> None:
        super().__init__(objective=objective or CrossEntropy(), steps=steps, lr=lr, seed=seed)
        self.objective = objective

    @override
    def _start(self, name: str, shape: tuple[int, ...], num_tasks: int) -> dict[str, Tensor]:
        return {name: torch.zeros(num_tasks, dtype=torch.float64)}

    @override
    def _combine(self, name: str, taus: list[Tensor], coefficients: Mapping[str, Tensor], moment: Moment) -> Tensor:
        return weighted(taus, coefficients[name].softmax(dim=0))


class HyperplaneSoup(Learned):
    """Average the models with weights of any sign that sum to 1, per block (MEHL-Soup, Li et al., arXiv 2407.03641).

    The model is the mean c of the experts plus ``sum(x_i d_i)``, where ``d_i`` is an expert's difference from the mean,
    normalised per block; x starts at 0, the average, and anew after every task, because the mean has moved. The
    released code also has a schedule of the learning rate, which is constant here.

    Args:
        steps: Optimizer steps after every task.
        lr: Learning rate of AdamW, without weight decay, in units of the weights.
        block: Regular expression that finds the index of a block in a parameter name; parameters outside of the blocks
            are one more.
        objective: What is minimised. Default: ``CrossEntropy()`` over the classes of each image's task.
        seed: Seed of the order of the images.

    Raises:
        ValueError: If a setting is out of range.
    """

    name = "hyperplane_soup"
    summary = "average of the task vectors with weights of any sign that sum to 1, learned per block"
    source = "2407.03641"
    optimizer = "adamw"
    warm_starts = False

    def __init__(
        self,
        *,
        steps: int = 200,
        lr: float = 0.01,
        block: str = BLOCK,
        objective: Objective | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(objective=objective or CrossEntropy(), steps=steps, lr=lr, seed=seed)
        self.block = block
        self.objective = objective

    def _key(self, name: str) -> str:
        found = re.search(self.block, name)
        return name[: found.end()] if found else ""

    @override
    def _start(self, name: str, shape: tuple[int, ...], num_tasks: int) -> dict[str, Tensor]:
        return {self._key(name): torch.zeros(num_tasks, dtype=torch.float64)}

    @override
    def _survey(self, names: list[str], taus: Taus) -> dict[str, Tensor]:
        """Return the length of every expert's difference from the mean, by block."""
        squares: dict[str, Tensor] = {}
        for name in names:
            stacked = torch.stack(taus(name)).to(torch.float64)
            found = (stacked - stacked.mean(dim=0)).square().reshape(len(stacked), -1).sum(dim=1)
            key = self._key(name)
            squares[key] = squares[key] + found if key in squares else found
        return {key: found.sqrt() for key, found in squares.items()}

    @override
    def _combine(self, name: str, taus: list[Tensor], coefficients: Mapping[str, Tensor], moment: Moment) -> Tensor:
        key = self._key(name)
        lengths = moment.survey[key]
        moved = coefficients[key].to(lengths) / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
        moved = moved * (lengths > 0)
        return weighted(taus, 1 / len(taus) + moved - moved.mean())


class TrajectorySoup(Learned):
    """Train on in the span of the vectors, from their average (TWA, Li et al., arXiv 2205.13104).

    Gradient descent with momentum on the model's weights whose every step is projected onto the span, so that weights
    need not sum to 1. In the paper the vectors are checkpoints of one fit, and the images those that it was trained on;
    here they are whatever vectors come, and the declared adaptation data. It starts anew after every vector, which has
    widened the span. The paper's weight decay of 1e-5 is left out.

    Args:
        steps: Optimizer steps after every vector.
        lr: Learning rate of SGD with momentum 0.9, for the model's weights; 0.03 to 2 in the paper.
        objective: What is minimised. Default: ``CrossEntropy()`` over the classes of each image's task.
        seed: Seed of the order of the images.

    Raises:
        ValueError: If a setting is out of range.
    """

    name = "trajectory_soup"
    summary = "gradient descent projected onto the span of the task vectors, from their average"
    source = "2205.13104"
    optimizer = "sgd"
    warm_starts = False

    def __init__(
        self, *, steps: int = 200, lr: float = 0.03, objective: Objective | None = None, seed: int = 0
    ) -> None:
        super().__init__(objective=objective or CrossEntropy(), steps=steps, lr=lr, seed=seed)
        self.objective = objective

    @override
    def _start(self, name: str, shape: tuple[int, ...], num_tasks: int) -> dict[str, Tensor]:
        return {"all": torch.zeros(num_tasks, dtype=torch.float64)}

    @override
    def _survey(self, names: list[str], taus: Taus) -> Tensor:
        """Return the weights of an orthonormal basis of the span, one column for each of its vectors."""
        grams = (torch.stack(taus(name)).to(torch.float64).reshape(len(taus(name)), -1) for name in names)
        gram = torch.stack([vectors @ vectors.t() for vectors in grams]).sum(dim=0)
        values, vectors = torch.linalg.eigh(gram)
        live = values > values[-1] * len(values) * torch.finfo(torch.float32).eps
        basis: Tensor = vectors * torch.where(live, values, torch.inf).rsqrt()
        return basis

    @override
    def _combine(self, name: str, taus: list[Tensor], coefficients: Mapping[str, Tensor], moment: Moment) -> Tensor:
        basis = moment.survey
        return weighted(taus, 1 / len(taus) + basis @ coefficients["all"].to(basis))
