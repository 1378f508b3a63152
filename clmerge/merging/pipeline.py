"""The composed rule: any sparsifier before any reducer before any finisher."""

from copy import deepcopy
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import SlotDtypes, Slots
from clmerge.merging.checks import Shapes
from clmerge.merging.finish import Finisher
from clmerge.merging.linear import TaskArithmetic
from clmerge.merging.merger import Merger
from clmerge.merging.scope import widest
from clmerge.merging.sparsify import Sparsified, Sparsifier
from clmerge.merging.step import Score, Step
from clmerge.weights.bank import TaskVectorBank
from clmerge.weights.task_vector import State, TaskVector


class Pipeline(Merger):
    """Sparsify every task vector, reduce them with any rule, finish the result.

    The pipeline is as exact, as order-free and as large as its reducer, and asks for what its reducer
    requires.

    Args:
        reducer: The rule that merges; the pipeline works on its own copy. Default: ``TaskArithmetic()``.
        sparsifier: What is done to every task vector before it. Default: nothing.
        finisher: What is done to the merged vector after it. Default: nothing.

    Example:
        >>> from clmerge.merging import MagMax, Scale, TrimTensor
        >>> merger = Pipeline(MagMax(scale=1.0), sparsifier=TrimTensor(density=0.5), finisher=Scale(0.1))
        >>> merger.update({"w": torch.tensor([1.0, -30.0])})
        >>> merger.update({"w": torch.tensor([20.0, 2.0])})
        >>> merger.compute()
        {'w': tensor([ 2., -3.])}
    """

    name = "pipeline"
    summary = "any sparsifier before any rule before any finisher"
    source = ""

    def __init__(
        self,
        reducer: Merger | None = None,
        *,
        sparsifier: Sparsifier | None = None,
        finisher: Finisher | None = None,
    ) -> None:
        self._inner = deepcopy(reducer) if reducer is not None else TaskArithmetic()
        super().__init__()
        self._inner.reset()
        self.reducer = reducer
        self.sparsifier = sparsifier
        self.finisher = finisher
        self.exact_online = self._inner.exact_online
        self.order_free = self._inner.order_free
        self.removable = self._inner.removable
        self.requires = self._inner.requires
        self.keeps_vectors = self._inner.keeps_vectors
        self.reading_bytes = self._inner.reading_bytes
        self.scope = widest(self._inner, sparsifier, finisher)
        self._sums = finisher is not None and finisher.uses_sum
        if self._sums and "score" in self.requires:
            raise ValueError(
                f"expected a finisher without the sum of the task vectors for {self._inner!r}, which scores candidates "
                f"before they are merged, got {finisher!r}; set its alpha"
            )
        self._sparsify_with([])

    @override
    def compute(self) -> TaskVector:
        return self._finished(self._inner.compute())

    @override
    def task_view(self, task: int) -> TaskVector:
        return self._finished(self._inner.task_view(task))

    @override
    def matrices(self, shapes: Shapes) -> list[str]:
        return self._inner.matrices(shapes)

    @override
    def use_bank(self, bank: TaskVectorBank) -> None:
        self._inner.use_bank(bank)

    @override
    def to(self, device: torch.device | str) -> Self:
        self._inner.to(device)
        return super().to(device)

    @override
    def state_size(self, num_params: int, num_tasks: int) -> int:
        return self._inner.state_size(num_params, num_tasks) + super().state_size(num_params, num_tasks)

    @override
    def _sparsify_with(self, sparsifiers: list[Sparsifier]) -> bool:
        own = [] if self.sparsifier is None else [self.sparsifier]
        self._handed_down = self._inner._sparsify_with([*sparsifiers, *own])
        return self._handed_down

    @override
    def _slot_dtypes(self, num_tasks: int) -> SlotDtypes:
        return {"sum": None} if self._sums else {}

    @override
    def _fold_block(self, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        slots["sum"].add_(tau, alpha=step.sign)

    @override
    def _take(self, vector: State, shapes: Shapes, base: str | None, step: Step) -> None:
        if step.score is not None and self.finisher is not None:
            step = replace(step, score=self._score_finished(step.score))
        sparse = vector
        if self.sparsifier is not None and not self._handed_down:
            sparse = Sparsified(vector, self.sparsifier, step.task)
        self._inner._take(sparse, shapes, base, step)
        if self._sums:
            super()._take(vector, shapes, base, step)
        else:
            self._shapes, self.base, self.num_tasks = shapes, self.base or base, self.num_tasks + step.sign

    @override
    def _float_dtypes(self) -> dict[str, torch.dtype]:
        return self._inner._float_dtypes()

    def _finished(self, vector: TaskVector) -> TaskVector:
        if self.finisher is None:
            return vector
        total = {name: slots["sum"] for name, slots in self._slots.items()}
        return self.finisher.finish_beside(vector, total, self.num_tasks)

    def _score_finished(self, score: Score) -> Score:
        return lambda vector: score(self._finished(vector))

    @override
    def _extras(self) -> dict[str, Any]:
        return {"reducer": self._inner.state_dict()}

    @override
    def _load_extras(self, extras: dict[str, Any]) -> None:
        if extras:
            self._inner.load_state_dict(extras["reducer"])
        else:
            self._inner.reset()

    @override
    def _join_extras(self, other: Self) -> None:
        self._inner.merge_state(other._inner)
