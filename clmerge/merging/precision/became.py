"""BECAME: interpolate between the merged model and the new one, by the Fisher information of all tasks."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots, device_of, slot_blocks
from clmerge.merging.precision.informed import Informed
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State


class BECAME(Informed):
    """Interpolate between the merged model and the new one at the optimum of their Laplace approximations.

    With ``d = tau - merged``, the diagonal Fisher ``H`` of the new task and the sum ``L`` of those before it, the
    share ``d^T H d / (d^T L d + d^T H d)`` minimises the two quadratic losses on the line between the models: one
    number for the model. BECAME (arXiv 2504.02666) and P&M (arXiv 2505.22389) interpolate by such a coefficient; it
    is derived here from the two losses and was not compared with their code. Their training methods are not part of
    the rule. The first task vector is taken unchanged; where the Fisher is zero along ``d``, all tasks count
    equally. The result depends on the order of tasks. State: 8 bytes per parameter.

    Example:
        >>> import torch
        >>> merger = BECAME()
        >>> merger.update({"w": torch.tensor([0.0])}, statistics={"fisher": {"w": torch.tensor([1.0])}})
        >>> merger.update({"w": torch.tensor([4.0])}, statistics={"fisher": {"w": torch.tensor([3.0])}})
        >>> merger.compute()
        {'w': tensor([3.])}
    """

    name = "became"
    summary = "interpolation with the merged model by the Fisher information along the line"
    source = "2504.02666"
    order_free = False
    slots = ("merged", "fisher")

    @override
    def _plan(self, vector: State, step: Step) -> tuple[State, float]:
        fisher, _ = super()._plan(vector, step)
        new = old = 0.0
        for name, slots in self._slots.items():
            others = (tensor.detach().to(device_of(slots)) for tensor in (vector[name], fisher[name]))
            for block, (tau, information) in slot_blocks(slots, *others):
                # Squares of float32 numbers times small Fishers may underflow in float32.
                squares = (tau.double() - block["merged"].double()).square()
                new += float((squares * information.double()).sum())
                old += float((squares * block["fisher"].double()).sum())
        if not step.position:
            return fisher, 1.0
        return fisher, new / (new + old) if new + old > 0 else 1 / (step.position + 1)

    @override
    def _fold_informed(self, slots: Slots, tau: Tensor, information: Tensor, step: Step, plan: float) -> None:
        slots["merged"].lerp_(tau, plan)
        slots["fisher"].add_(information)

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        return slots["merged"]
