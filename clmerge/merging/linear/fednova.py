"""FedNova: average the updates per local step."""

import math
from typing import Any

from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.linear.weighted_sum import Share, WeightedSum
from clmerge.merging.required import positive_number_of
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State


class FedNova(WeightedSum):
    """Average the updates per local step, then take the average number of steps (Wang et al., arXiv 2007.07481).

    With the share of the samples ``p_t = n_t / sum(n)`` and ``s_t`` local steps the result is ``scale * sum(p_t s_t)
    * sum(p_t tau_t / s_t)``: longer training does not give a task more weight. With equal steps it is FedAvg.
    This is the paper's rule for plain SGD, where the norm of the step weights is the number of steps. State: 4 bytes
    per parameter.

    Args:
        scale: Scaling coefficient; 1 is the paper's rule.

    Example:
        >>> import torch
        >>> merger = FedNova()
        >>> merger.update({"w": torch.tensor([1.0])}, statistics={"samples": 100, "steps": 10})
        >>> merger.update({"w": torch.tensor([9.0])}, statistics={"samples": 100, "steps": 30})
        >>> merger.compute()
        {'w': tensor([4.])}
    """

    name = "fednova"
    summary = "mean of the task vectors per local step, times the mean number of steps"
    source = "2007.07481"
    requires = frozenset({"samples", "steps"})
    scope = "parameter"

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(scale)
        self._samples = 0.0
        self._sample_steps = 0.0
        self._keep("_samples", join="sum")
        self._keep("_sample_steps", join="sum")

    @override
    def _log_weights(self, vector: State, step: Step) -> dict[str, float]:
        log = math.log(positive_number_of(step, "samples")) - math.log(positive_number_of(step, "steps"))
        return dict.fromkeys(vector, log)

    @override
    def _after_update(self, step: Step, plan: dict[str, Share]) -> None:
        super()._after_update(step, plan)
        samples = positive_number_of(step, "samples")
        self._samples += step.sign * samples
        self._sample_steps += step.sign * samples * positive_number_of(step, "steps")

    @override
    def _read(self, name: str, slots: Slots, overview: Any) -> Tensor:
        total = self._total(name)
        weights = total.value * math.exp(total.offset)
        # The average divides by the sum of n / s, FedNova by the sum of n.
        return super()._read(name, slots, overview).mul_(weights * self._sample_steps / self._samples**2)
