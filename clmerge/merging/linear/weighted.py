"""Weighted averages of task vectors: by samples, by losses, by inverse norms, by given preferences."""

import math
from collections.abc import Sequence
from typing import Literal

from typing_extensions import override

from clmerge.merging.checks import checked_choice, of_task
from clmerge.merging.linear.weighted_sum import WeightedSum
from clmerge.merging.norms import vector_norm
from clmerge.merging.required import number_of, positive_number_of
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State

Weighting = Literal["samples", "loss", "inverse_norm", "given"]

_STATISTICS = {"samples": frozenset({"samples"}), "loss": frozenset({"loss"})}


class WeightedAverage(WeightedSum):
    """Average the task vectors with one weight per task: ``scale * sum(w_t tau_t) / sum(w_t)``.

    - ``"samples"``: the number of training samples, as in federated averaging (FedAvg, arXiv 1602.05629).
    - ``"loss"``: ``exp(-loss / temperature)``, the softmax of the negative losses of the experts. LM-Cocktail (arXiv
      2311.13534) uses the losses of all experts, and of the base model, on the same few examples of one target task,
      then mixes with the base model (``scale`` is the share of the average): pass those losses to ``update``. A run of
      ``clmerge fit`` has no examples of future tasks and passes every expert's loss on its *own* task's images, which
      favours easy tasks.
    - ``"inverse_norm"``: ``1 / |tau|`` over the whole vector (NAN, arXiv 2505.16148). A zero vector has no weight.
    - ``"given"``: a preference per task index, a point of the simplex (rewarded soups, arXiv 2306.04488). Until all
      tasks are merged, the preferences of the merged tasks are rescaled to sum 1.

    A task with nearly all of the weight cannot be removed, because only rounding error would remain. State: 4 bytes
    per parameter.

    Args:
        by: Source of the weights, as above. ``"samples"`` and ``"loss"`` are statistics of ``update``.
        weights: The preferences for ``"given"``, by task index, non-negative, with sum 1.
        temperature: Temperature of the softmax for ``"loss"``: the larger, the more equal the weights.
        scale: Scaling coefficient; 1 is the plain weighted mean.

    Raises:
        ValueError: If only one of ``weights`` and ``by="given"`` is set, or ``weights`` is not on the simplex.

    Example:
        >>> import torch
        >>> merger = WeightedAverage()
        >>> merger.update({"w": torch.tensor([1.0])}, statistics={"samples": 300})
        >>> merger.update({"w": torch.tensor([5.0])}, statistics={"samples": 100})
        >>> merger.compute()
        {'w': tensor([2.])}
    """

    name = "weighted_average"
    summary = "mean weighted by samples, losses, inverse norms or given preferences"
    source = "1602.05629"
    per_task = ("weights",)
    requires = frozenset({"samples"})

    def __init__(
        self,
        by: Weighting = "samples",
        *,
        weights: Sequence[float] | None = None,
        temperature: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__(scale)
        self.by: Weighting = checked_choice("by", by, Weighting)
        if (by == "given") != (weights is not None):
            raise ValueError(f"expected weights together with by='given', got by={by!r} and weights={weights}")
        if weights is not None and (min(weights, default=-1) < 0 or not math.isclose(sum(weights), 1.0, abs_tol=1e-6)):
            raise ValueError(f"expected weights of 0 or more with sum 1, got {list(weights)} with sum {sum(weights)}")
        if not temperature > 0:
            raise ValueError(f"expected a positive temperature, got {temperature}")
        self.weights = None if weights is None else list(weights)
        self.temperature = temperature
        self.requires = _STATISTICS.get(by, frozenset())
        self.scope = "model" if by == "inverse_norm" else "parameter"

    @override
    def _log_weights(self, vector: State, step: Step) -> dict[str, float]:
        return dict.fromkeys(vector, self._log_weight(vector, step))

    def _log_weight(self, vector: State, step: Step) -> float:
        if self.by == "samples":
            return math.log(positive_number_of(step, "samples"))
        if self.by == "loss":
            return -number_of(step, "loss") / self.temperature
        if self.weights is None:
            weight = 1 / (vector_norm(vector) or math.inf)
        else:
            weight = of_task("weights", self.weights, step.task)
        return math.log(weight) if weight else -math.inf
