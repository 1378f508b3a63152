"""Precision rules: every entry of a task is weighted by its Fisher information."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots, slot_blocks
from clmerge.merging.checks import checked_choice
from clmerge.merging.orientation import IN_OUT, from_output_rows, output_rows
from clmerge.merging.precision.informed import Informed
from clmerge.merging.removal import Removable, largest_entry, magnitude, share_of
from clmerge.merging.scope import Scope
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State

Granularity = Literal["entry", "row"]


class _Precision(Informed, Removable):
    """Keep the sum of weighted task vectors and the sum of the Fisher information.

    The error of a removal is bounded entry by entry: where the removed task had nearly all of the information, the
    remaining sums are mostly rounding error.
    """

    prior: float = 0.0  # Fisher information before any task
    slots = ("weighted", "fisher")

    def __init__(self, statistic: str) -> None:
        super().__init__(statistic)
        self._error = 0.0  # bound on the relative error that removals have left in the sums
        self._largest = 0.0  # entry of any task vector that was merged
        self._keep("_error", join=max)
        self._keep("_largest", join=max)

    @override
    def _fold_informed(self, slots: Slots, tau: Tensor, information: Tensor, step: Step, plan: Any) -> None:
        weight, kept = self._weights(information)
        slots["weighted"].addcmul_(weight, tau, value=step.sign)
        slots["fisher"].add_(kept, alpha=step.sign)

    @override
    def _mass(self, vector: State, step: Step, plan: Any) -> float:
        largest = largest_entry(vector, step)
        self._largest = max(self._largest, largest)
        return largest

    @override
    def _uncertain(self, before: dict[str, Slots], extras: dict[str, Any], plan: Any) -> float:
        shrunk = 1.0  # largest factor by which an entry's information shrinks
        remains = 0.0  # largest entry of the remaining average
        for name, slots in self._slots.items():
            for block, (old,) in slot_blocks(slots, before[name]["fisher"]):
                rest = block["fisher"] + self.prior
                if not bool((rest > 0).all()):
                    return math.inf
                shrunk = max(shrunk, float(((old + self.prior) / rest).max()))
                remains = max(remains, magnitude(block["weighted"] / rest))
        self._error = shrunk * (self._error + 2 * self._unit() * self.num_tasks)
        return share_of(self._error * self._largest, remains)

    @abstractmethod
    def _weights(self, fisher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of the task vector, and the term that is added to the sum of the Fisher."""


class Fisher(_Precision):
    """Average the task vectors by their Fisher information (Matena & Raffel, arXiv 2111.09832).

    ``scale * sum(F_t * tau_t) / sum(F_t)``, entry by entry, with the diagonal Fisher ``F_t`` of task t at its own
    fine-tuned weights. Theta0 cancels, so task vectors give the paper's average of weights. ``F_t`` is at least
    ``floor``: an entry without information in any task is the plain mean. State: 8 bytes per parameter.

    The paper's Fisher is exact, a mean over examples of squared gradients with labels drawn from the model;
    ``clmerge.statistics.collectors.diagonal_fisher`` computes it. MergeLM and FusionBench square the gradient of a
    sum over examples and classes, which is another quantity.

    Removing a task is refused if it had nearly all of the information about any entry: the remaining sums would be
    mostly rounding error there.

    Args:
        floor: Least Fisher information of an entry, above 0. The released code has 1e-6, for some models only.
        granularity: ``"entry"`` is the paper's rule; ``"row"`` uses the mean information over all weights of one
            output of a layer, which is less noisy. (Fisher information of mask nodes is another rule:
            ``FisherMaskNodes``.)
        normalize: Divide each task's Fisher by its norm over all parameters, as the released code does, so that
            every task weighs the same in total. The floor is applied afterwards.
        transposed: Patterns of matrices of shape (in, out), for rows. Default: CLIP's ``proj`` and
            ``text_projection``.
        scale: Scaling coefficient; 1 is the paper's rule.

    Raises:
        ValueError: If ``floor`` is not positive or ``granularity`` is unknown.

    Example:
        >>> import torch
        >>> merger = Fisher()
        >>> merger.update({"w": torch.tensor([1.0, 2.0])}, statistics={"fisher": {"w": torch.tensor([3.0, 0.0])}})
        >>> merger.update({"w": torch.tensor([5.0, 4.0])}, statistics={"fisher": {"w": torch.tensor([1.0, 0.0])}})
        >>> merger.compute()
        {'w': tensor([2., 3.])}
    """

    name = "fisher"
    summary = "mean weighted by the diagonal Fisher information"
    source = "2111.09832"
    scope: Scope = "parameter"

    def __init__(
        self,
        floor: float = 1e-12,
        *,
        granularity: Granularity = "entry",
        normalize: bool = False,
        statistic: str = "fisher",
        transposed: Sequence[str] = IN_OUT,
        scale: float = 1.0,
    ) -> None:
        super().__init__(statistic)
        if not floor > 0:
            raise ValueError(f"expected floor above 0, got {floor}; without it an entry nobody knows is 0/0")
        self.floor = floor
        self.granularity = checked_choice("granularity", granularity, Granularity)
        self.normalize = normalize
        self.transposed = tuple(transposed)
        if normalize:
            self.scope = "model"
        self.scale = scale

    @override
    def _plan(self, vector: State, step: Step) -> tuple[State, Any]:
        fisher, _ = super()._plan(vector, step)
        if self.granularity == "row":
            fisher = {name: self._by_row(name, tensor) for name, tensor in fisher.items()}
        if self.normalize:
            norm = sum(float(tensor.double().square().sum()) for tensor in fisher.values()) ** 0.5
            fisher = {name: tensor / norm for name, tensor in fisher.items()} if norm else fisher
        return fisher, None

    def _by_row(self, name: str, fisher: Tensor) -> Tensor:
        if fisher.ndim < 2:
            return fisher
        rows = output_rows(name, fisher, self.transposed)
        means = rows.mean(dim=1, keepdim=True).expand(rows.shape)
        return from_output_rows(name, means, tuple(fisher.shape), self.transposed)

    @override
    def _weights(self, fisher: Tensor) -> tuple[Tensor, Tensor]:
        weight = fisher.clamp(min=self.floor)
        return weight, weight

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        # Only rounding after the removal of a task can make the sum smaller than that.
        return slots["weighted"] / slots["fisher"].clamp(min=self.floor * self.num_tasks) * self.scale


class UGM(_Precision):
    """Merge by uncertainty-based gradient matching (Daheim et al., arXiv 2310.12808).

    ``sum(a (H0 + H_t) tau_t) / (H0 + sum(a H_t))`` with the diagonal Fisher ``H_t`` of task t and ``a = scale``. The
    prior precision ``H0`` of the base model's weights is one number here: an isotropic Gaussian around
    theta0. The paper also uses the Fisher of the base model on its training data, which is rarely available. With
    ``prior`` 0 this is the Fisher average, with a large one task arithmetic. State: 8 bytes per parameter.

    Args:
        scale: The paper's coefficient of every task; 1 is its default.
        prior: ``H0`` in units of the Fisher information per example, above 0. The paper recommends no single value:
            compare several near the size of the Fisher.

    Raises:
        ValueError: If ``scale`` or ``prior`` is not positive.

    Example:
        >>> import torch
        >>> merger = UGM(prior=1.0)
        >>> merger.update({"w": torch.tensor([1.0])}, statistics={"fisher": {"w": torch.tensor([3.0])}})
        >>> merger.update({"w": torch.tensor([4.0])}, statistics={"fisher": {"w": torch.tensor([0.0])}})
        >>> merger.compute()
        {'w': tensor([2.])}
    """

    name = "ugm"
    summary = "sum of the task vectors with the Fisher's correction for gradient mismatch"
    source = "2310.12808"

    def __init__(self, scale: float = 1.0, *, prior: float = 1e-6, statistic: str = "fisher") -> None:
        super().__init__(statistic)
        if not (scale > 0 and prior > 0):
            raise ValueError(
                f"expected scale and prior above 0, got {scale} and {prior}; Fisher() is the rule without a prior"
            )
        self.scale = scale
        self.prior = prior

    @override
    def _weights(self, fisher: Tensor) -> tuple[Tensor, Tensor]:
        return fisher + self.prior, fisher

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        information = slots["fisher"].clamp(min=0)
        return slots["weighted"] * self.scale / (information * self.scale + self.prior)
