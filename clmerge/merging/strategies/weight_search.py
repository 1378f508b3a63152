"""Search one weight per task by a held-out score, with any strategy."""

from collections.abc import Sequence

from typing_extensions import override

from clmerge.merging.linear.mixed import Mixed
from clmerge.merging.linear.soup import measured
from clmerge.merging.step import Step
from clmerge.merging.strategies.goal import Goal
from clmerge.merging.strategies.methods import METHODS, Method
from clmerge.merging.strategies.space import Space
from clmerge.merging.strategies.strategy import Problem
from clmerge.weights.task_vector import State


class WeightSearch(Mixed):
    """Add the task vectors with the weights that score best on held-out data, searched anew after every task.

    A strategy asks for weights, every candidate ``theta_0 + sum(w_t tau_t)`` is scored, and the best is kept. It is

    - evolutionary merging (arXiv 2403.13187) with ``method="cma_es"``;
    - MAP (arXiv 2406.07529) with ``"quadratic"``, of the mean accuracy: the score is one number. ``clmerge compare
      --search quadratic`` fits one surrogate per task and has the Pareto front;
    - LoraHub (arXiv 2307.13269) over LoRA experts, with weights from -1.5 to 1.5, a budget of 40 and ``l1=0.05``; its
      authors use the loss where here is the accuracy, and add up factors where here products are added.

    The search begins at the weights of the task before, and at their mean for the new one; before the first task at the
    middle. The task vectors are kept: 4 bytes per parameter and task, or none with a bank. An update takes as many
    scores as the budget says.

    Args:
        values: Weights to try, the same for every task; strategies other than ``grid`` and ``differential_evolution``
            try all numbers from the smallest to the largest.
        method: Name of the strategy. ``cma_es``, ``gaussian`` and ``nsga`` need the extra ``search``.
        budget: Scores per update. Default: the strategy's own choice.
        l1: What the mean magnitude of the weights costs in the score.
        seed: Seed of what the strategy draws.

    Raises:
        ValueError: If there are fewer than two values, ``l1`` is negative, or there is no such method.

    Example:
        >>> import torch
        >>> merger = WeightSearch(values=[0.0, 0.5, 1.0], method="grid")
        >>> merger.update({"w": torch.tensor([4.0])}, score=lambda vector: -abs(vector["w"].item() - 2.1))
        >>> merger.weights
        [0.5]
    """

    name = "weight_search"
    summary = "sum of the task vectors with weights searched by a held-out score (evolution, surrogate, LoraHub)"
    source = "2307.13269"
    requires_score = True

    def __init__(
        self,
        values: Sequence[float] = (0.0, 1.0),
        *,
        method: Method = "quadratic",
        budget: int | None = None,
        l1: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(set(values)) < 2:
            raise ValueError(f"expected two values or more to search between, got {list(values)}")
        if not l1 >= 0:
            raise ValueError(f"expected l1 of 0 or more, got {l1}")
        if method not in METHODS:
            raise ValueError(f"expected one of {', '.join(METHODS)} as method, got {method!r}")
        self.values = [float(value) for value in values]
        self.method: Method = method
        self.budget = budget
        self.l1 = l1
        self.seed = seed

    @override
    def _plan(self, vector: State, step: Step) -> list[float]:
        if step.score is None:
            raise ValueError("expected a held-out metric for WeightSearch, got none; pass score=... to update()")
        latest = self._sparsified(vector, step.task)
        before = [*self.weights, sum(self.weights) / len(self.weights)] if self.weights else []
        names = [f"weights[{position}]" for position in range(step.position + 1)]
        strategy = METHODS[self.method](
            Problem(
                Space({name: self.values for name in names}),
                Goal([1.0]),
                budget=self.budget,
                start=dict(zip(names, before, strict=False)),
                seed=self.seed,
            )
        )
        best, highest = [0.0] * len(names), float("-inf")
        while asked := strategy.ask():
            scores = []
            for point in asked:
                weights = [float(point[name]) for name in names]
                penalty = self.l1 * sum(map(abs, weights)) / len(weights)
                scores.append(measured(step.score, self._mixture(weights, latest)) - penalty)
                if scores[-1] > highest:
                    best, highest = weights, scores[-1]
            strategy.tell([[score] for score in scores])
        return best
