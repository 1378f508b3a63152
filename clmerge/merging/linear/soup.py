"""Greedy soups: average the task vectors that do not lower a held-out metric."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.linear.mixed import Mixed
from clmerge.merging.merger import Merger
from clmerge.merging.step import Score, Step
from clmerge.weights.task_vector import State, TaskVector


def measured(score: Score, vector: TaskVector) -> float:
    """Return the held-out metric of theta0 + vector.

    Args:
        score: The metric.
        vector: The vector to add to theta0.

    Raises:
        ValueError: If the metric is NaN, which no comparison can rank.
    """
    value = float(score(vector))
    if math.isnan(value):
        raise ValueError("expected a number from the held-out metric, got NaN; check the held-out data")
    return value


class GreedySoup(Merger):
    """Average the task vectors that improve a held-out metric, in order of arrival (Wortsman et al., arXiv 2203.05482).

    The first task vector is always kept. A later one is kept if the average with it scores at least as well
    as the average without it; both are scored with the metric passed to that ``update``, so the held-out data
    may grow.

    This differs from the batch recipe, which first sorts all models by their score (hence
    ``exact_online = False``): the stream cannot reconsider a vector it left out; ``SortedSoup`` keeps all vectors and
    does. State: 4 bytes per parameter.

    Args:
        strict: Whether the score must increase. Default: it must not decrease, as in the paper; the released code
            requires an increase.

    Example:
        >>> import torch
        >>> def score(vector):  # likes entries near 1.5, so 5.0 is left out
        ...     return -abs(vector["w"].item() - 1.5)
        >>> merger = GreedySoup()
        >>> for value in (1.0, 5.0, 2.0):
        ...     merger.update({"w": torch.tensor([value])}, score=score)
        >>> merger.compute()
        {'w': tensor([1.5000])}
    """

    name = "greedy_soup"
    summary = "mean of the task vectors that do not lower a held-out metric"
    source = "2203.05482"
    exact_online = False
    order_free = False
    requires_score = True
    slots = ("sum",)

    def __init__(self, strict: bool = False) -> None:
        super().__init__()
        self.strict = strict
        self.num_kept = 0
        self._keep("num_kept")

    @override
    def _plan(self, vector: State, step: Step) -> bool:
        """Return whether the vector is kept."""
        if not self.num_kept or step.score is None:
            return True
        without = measured(step.score, self.compute())
        with_it = measured(step.score, self._average_with(vector))
        return with_it > without or (with_it == without and not self.strict)

    def _average_with(self, vector: State) -> TaskVector:
        count = self.num_kept + 1
        return {name: (slots["sum"] + vector[name].to(slots["sum"])) / count for name, slots in self._slots.items()}

    @override
    def _fold_block(self, slots: Slots, tau: Tensor, step: Step, plan: bool) -> None:
        if plan:
            slots["sum"].add_(tau)

    @override
    def _after_update(self, step: Step, plan: bool) -> None:
        self.num_kept += plan

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        return slots["sum"] / self.num_kept


class SortedSoup(Mixed):
    """Average the task vectors that improve a held-out metric, best model first (Wortsman et al., arXiv 2203.05482).

    The recipe as published: after every task all models theta_0 + tau_t are scored alone and sorted, and each is kept
    if the average with it scores at least as well as the average without. The metric is the one passed to the latest
    ``update``, so models that were left out are considered again. An update takes up to 2 T scores, of which T read
    task vectors only. The task vectors are kept: 4 bytes per parameter and task, or none with a bank.

    Args:
        strict: Whether the score must increase. Default: it must not decrease, as in the paper; the released code
            requires an increase.

    Example:
        >>> import torch
        >>> def score(vector):  # likes entries near 1.5, so 5.0 is left out, though it came first
        ...     return -abs(vector["w"].item() - 1.5)
        >>> merger = SortedSoup()
        >>> for value in (5.0, 1.0, 2.0):
        ...     merger.update({"w": torch.tensor([value])}, score=score)
        >>> merger.compute()
        {'w': tensor([1.5000])}
    """

    name = "sorted_soup"
    summary = "mean of the task vectors that do not lower a held-out metric, best first"
    source = "2203.05482"
    requires_score = True

    def __init__(self, strict: bool = False) -> None:
        super().__init__()
        self.strict = strict

    @override
    def _plan(self, vector: State, step: Step) -> list[float]:
        count = step.position + 1
        if step.score is None:
            raise ValueError("expected a held-out metric for SortedSoup, got none; pass score=... to update()")
        latest = self._sparsified(vector, step.task)
        singles = [measured(step.score, self._mixture(_mean_of([p], count), latest)) for p in range(count)]
        ranked = sorted(range(count), key=lambda position: -singles[position])
        chosen, best = ranked[:1], singles[ranked[0]]
        for position in ranked[1:]:
            value = measured(step.score, self._mixture(_mean_of([*chosen, position], count), latest))
            if value > best or (value == best and not self.strict):
                chosen, best = [*chosen, position], value
        return _mean_of(chosen, count)


def _mean_of(positions: Sequence[int], count: int) -> list[float]:
    """Return the weights with which a sum is the mean of some of the vectors."""
    return [(position in positions) / len(positions) for position in range(count)]
