"""Linear rules: the average of task vectors (uniform soup) and task arithmetic."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.checks import of_task
from clmerge.merging.linear.sum import Sum
from clmerge.merging.step import Step


class WeightAverage(Sum):
    """Average the task vectors, ``scale / T * sum(tau_t)``: the uniform soup (arXiv 2203.05482).

    With the default scale, theta0 plus the result is the mean of the fine-tuned models. State: 4 bytes per
    parameter.

    Args:
        scale: Scaling coefficient; 1 is the plain mean.

    Example:
        >>> import torch
        >>> merger = WeightAverage()
        >>> merger.update({"w": torch.tensor([1.0, 0.0])})
        >>> merger.update({"w": torch.tensor([3.0, 2.0])})
        >>> merger.compute()
        {'w': tensor([2., 1.])}
    """

    name = "weight_average"
    summary = "mean of the task vectors (uniform soup)"
    source = "2203.05482"

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        return slots["sum"] * (self.scale / self.num_tasks)


class TaskArithmetic(Sum):
    """Add the task vectors: ``scale * sum(tau_t)`` (Ilharco et al., arXiv 2212.04089).

    With a weight per task it is ``scale * sum(weights[t] * tau_t)``, which covers:

    - negation, which unlearns a task: a negative ``scale``, or a weight of -1 for one task;
    - analogies, where D is to C as B is to A: ``tau_C + tau_B - tau_A`` with ``weights=[1, 1, -1]`` for tasks C, B
      and A;
    - extrapolation beyond the fine-tuned model: one task and a ``scale`` above 1, which is 1 + alpha of ExPO
      (arXiv 2404.16792).

    State: 4 bytes per parameter.

    Args:
        scale: Scaling coefficient. The default 0.3 is the value that the paper and later work use for eight tasks;
            the best value decreases as tasks are added, and is about 0.8 for two tasks.
        weights: One weight per task index, of any sign, multiplied by ``scale``. Default: 1 for every task.

    Example:
        >>> import torch
        >>> merger = TaskArithmetic(scale=0.5)
        >>> merger.update({"w": torch.tensor([1.0, 0.0])})
        >>> merger.update({"w": torch.tensor([3.0, 2.0])})
        >>> merger.compute()
        {'w': tensor([2., 1.])}
    """

    name = "task_arithmetic"
    summary = "scaled sum of the task vectors; weights make negation, analogies and extrapolation"
    source = "2212.04089"
    per_task = ("weights",)

    def __init__(self, scale: float = 0.3, *, weights: Sequence[float] | None = None) -> None:
        super().__init__(scale)
        self.weights = None if weights is None else list(weights)

    @override
    def _weight(self, step: Step) -> float:
        return 1.0 if self.weights is None else of_task("weights", self.weights, step.task)

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        return slots["sum"] * self.scale
