"""AdaMerging: coefficients of task arithmetic that minimise the entropy of predictions, learned after every task."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.blocks import blocks
from clmerge.merging.checks import checked_choice
from clmerge.merging.learned.learned import Learned, Moment, Taus, weighted
from clmerge.merging.objectives import Entropy, Objective
from clmerge.merging.sign.ties import sum_of_signs
from clmerge.merging.sparsify.sparsifier import Sparsifier, TrimModel

Granularity = Literal["layer", "task"]


class AdaMerging(Learned):
    """Learn a coefficient for every task and layer, without labels (Yang et al., arXiv 2310.02575).

    The paper learns once, offline, on the test images that it reports. Here the coefficients of all tasks so far are
    learned after every task, on the declared adaptation data, from where those of the earlier tasks were. What other
    repositories call continual AdaMerging merges the latest task vector alone and forgets by construction; that is
    ``latest_only``.

    Coefficients are put back into [0, 1] after every step. The released code clamps them in the loss instead, where a
    coefficient that falls below 0 has no gradient any more and stays there.

    Args:
        granularity: A coefficient per task and ``"layer"``, which is every tensor of the state, biases and norms
            included, or per ``"task"``.
        elect: The paper's AdaMerging++: task vectors are trimmed to their largest 20 % and lose the entries that differ
            from the sign of the sum, as in TIES, before coefficients are learned.
        init: Start of a task's coefficients. None: 1 / t for every one of t tasks, and the coefficients learned so far
            times (t - 1) / t, so that without a step the result is the average; 0.3 leaves most of a single task out.
        steps: Optimizer steps after every task.
        lr: Learning rate of Adam: a coefficient moves by about as much in a step.
        clip: Whether coefficients stay in [0, 1].
        latest_only: Merge the latest task vector alone, and learn on images of its task.
        objective: What is minimised. Default: ``Entropy()`` over the classes of each image's task; ``Agreement()`` with
            ``lr=0.01`` is the objective of SyMerge (arXiv 2412.19098), whose heads are not trained here.
        seed: Seed of the order of the images.

    Raises:
        ValueError: If a setting is out of range.
    """

    name = "adamerging"
    summary = "coefficients per task and layer that minimise the entropy of predictions"
    source = "2310.02575"

    def __init__(
        self,
        *,
        granularity: Granularity = "layer",
        elect: bool = False,
        init: float | None = 0.3,
        steps: int = 500,
        lr: float = 1e-3,
        clip: bool = True,
        latest_only: bool = False,
        objective: Objective | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(objective=objective or Entropy(), steps=steps, lr=lr, seed=seed)
        self.granularity: Granularity = checked_choice("granularity", granularity, Granularity)
        self.elect = elect
        self.init = init
        self.clip = clip
        self.latest_only = latest_only
        self.warm_starts = not latest_only
        self.objective = objective
        self._sparsify_with([])

    @override
    def _sparsify_with(self, sparsifiers: list[Sparsifier]) -> bool:
        return super()._sparsify_with([*sparsifiers, *([TrimModel(0.2)] if self.elect else [])])

    @override
    def _start(self, name: str, shape: tuple[int, ...], num_tasks: int) -> dict[str, Tensor]:
        start = 1 / num_tasks if self.init is None else self.init
        return {self._key(name): torch.full((num_tasks,), start, dtype=torch.float64)}

    def _key(self, name: str) -> str:
        return name if self.granularity == "layer" else "all"

    @override
    def _warmed(self, before: Tensor, start: Tensor) -> Tensor:
        return super()._warmed(before if self.init is not None else before * (len(before) / len(start)), start)

    @override
    def _project(self, coefficients: Mapping[str, Tensor]) -> None:
        if self.clip:
            for tensor in coefficients.values():
                tensor.clamp_(0, 1)

    @override
    def _survey(self, names: list[str], taus: Taus) -> int:
        """Return the sign of entries whose sum is zero: that of most sums of the model."""
        if not self.elect:
            return 0
        totals = (total for name in names for (total,) in blocks(_total(taus(name)).reshape(-1)))
        return 1 if sum_of_signs(totals) > 0 else -1

    @override
    def _combine(self, name: str, taus: list[Tensor], coefficients: Mapping[str, Tensor], moment: Moment) -> Tensor:
        if self.elect:
            elected = _total(taus).sign_()
            elected.masked_fill_(elected == 0, moment.survey)
            taus = [tau * (tau.sign() == elected) for tau in taus]
        return weighted(taus, coefficients[self._key(name)])


def _total(taus: list[Tensor]) -> Tensor:
    total = taus[0].clone()
    for tau in taus[1:]:
        total.add_(tau)
    return total
