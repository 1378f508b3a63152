"""The product of relative changes: what addition is to LoRA, multiplication is to (IA)^3."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots, device_of, float_dtype, slot_blocks
from clmerge.merging.merger import Merger
from clmerge.merging.required import base_weights
from clmerge.merging.scope import Scope
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State


class FactorProduct(Merger):
    """Multiply the relative changes of the tasks: ``theta_0 * prod(1 + scale * tau_t / theta_0)``.

    This is the merging of AdaMergeX (arXiv 2402.18913) for adapters that multiply: of tasks tuned with ``IA3`` from
    theta_0 the factors are multiplied, as theirs are. Adapters that add, such as LoRA, are merged by
    ``TaskArithmetic``. A factor of 1 changes nothing, and two tasks that change different features do not disturb each
    other. Where theta_0 is zero the changes are added.

    After full fine-tuning the relative changes of small weights are large, and so are their products: use it for
    ``IA3``. State: 8 bytes per parameter, with theta_0 among them.

    Args:
        scale: Strength of every task's change; 1 is the plain product.

    Example:
        >>> theta0 = {"w": torch.tensor([2.0, 4.0])}
        >>> merger = FactorProduct()
        >>> merger.update({"w": torch.tensor([1.0, 0.0])}, statistics={"weights": theta0})  # times 1.5 and 1
        >>> merger.update({"w": torch.tensor([2.0, 4.0])}, statistics={"weights": theta0})  # times 2
        >>> theta0["w"] + merger.compute()["w"]
        tensor([6., 8.])
    """

    name = "factor_product"
    summary = "product of the relative changes, for (IA)^3"
    source = "2402.18913"
    requires = frozenset({"weights"})
    scope: Scope = "parameter"  # _plan only looks whether the weights fit
    slots = ("sum", "weights")

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    @override
    def _plan(self, vector: State, step: Step) -> State:
        return base_weights(step, vector, vector)

    @override
    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: State) -> None:
        dtype = float_dtype(slots)
        for block, (piece, weights) in slot_blocks(slots, tau, plan[name].detach().to(device_of(slots))):
            block["weights"].copy_(weights)
            self._multiply(block, piece.to(dtype) * self.scale)

    def _multiply(self, slots: Slots, change: Tensor) -> None:
        """Apply another change of theta_0 to the merged change, in place."""
        weights = slots["weights"]
        cross = torch.where(weights == 0, 0.0, slots["sum"] / torch.where(weights == 0, 1.0, weights) * change)
        slots["sum"].add_(change).add_(cross)

    @override
    def _join_block(self, slots: Slots, other: Slots) -> None:
        self._multiply(slots, other["sum"])

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        return slots["sum"].clone()
