"""Linear rules: the average of task vectors (uniform soup) and task arithmetic."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import SlotDtypes, Slots
from clmerge.merging.merger import Merger, Step


class _Sum(Merger):
    """Keep the sum of the task vectors, in one accumulator per parameter."""

    removable = True

    @override
    def _slot_dtypes(self, num_tasks: int) -> SlotDtypes:
        return {"sum": None}

    @override
    def _fold_block(self, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        slots["sum"].add_(tau, alpha=step.sign)


class WeightAverage(_Sum):
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

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        return slots["sum"] * (self.scale / self.num_tasks)


class TaskArithmetic(_Sum):
    """Add the task vectors: ``scale * sum(tau_t)`` (Ilharco et al., arXiv 2212.04089).

    A negative scale subtracts what was learned (negation). State: 4 bytes per parameter.

    Args:
        scale: Scaling coefficient. The default 0.3 is what the paper's authors and their followers use for
            eight tasks; the best value falls as tasks are added, and two tasks want about 0.8.

    Example:
        >>> import torch
        >>> merger = TaskArithmetic(scale=0.5)
        >>> merger.update({"w": torch.tensor([1.0, 0.0])})
        >>> merger.update({"w": torch.tensor([3.0, 2.0])})
        >>> merger.compute()
        {'w': tensor([2., 1.])}
    """

    name = "task_arithmetic"
    summary = "scaled sum of the task vectors; a negative scale is negation"
    source = "2212.04089"

    def __init__(self, scale: float = 0.3) -> None:
        super().__init__()
        self.scale = scale

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        return slots["sum"] * self.scale
