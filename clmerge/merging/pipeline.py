"""The composed rule: any sparsifier before any reducer before any finisher."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any, Self

import torch
from typing_extensions import override

from clmerge.merging.checks import Shapes
from clmerge.merging.finish.finisher import Finisher
from clmerge.merging.linear.arithmetic import TaskArithmetic
from clmerge.merging.merger import Merger
from clmerge.merging.scope import widest
from clmerge.merging.sparsify.sparsifier import Sparsified, Sparsifier
from clmerge.merging.step import Score, Step
from clmerge.weights.task_vector import State, TaskVector


class Pipeline(Merger):
    """Sparsify every task vector, reduce them with any rule, finish the result.

    Exactness, order dependence, state size and required statistics of the pipeline are those of its reducer.

    Args:
        reducer: The rule that merges; the pipeline works on its own copy. Default: ``TaskArithmetic()``.
        sparsifier: Applied to every task vector before the reducer. Default: nothing.
        finisher: Applied to the merged vector after the reducer. Default: nothing.

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
        self.task_views = self._inner.task_views
        self.requires = self._inner.requires
        self.requires_score = self._inner.requires_score
        self.requires_gradient = self._inner.requires_gradient
        self.reads_labels = self._inner.reads_labels
        self.keeps_vectors = self._inner.keeps_vectors
        self.reading_bytes = self._inner.reading_bytes
        self.scope = widest(self._inner, sparsifier, finisher)
        if sparsifier is not None and sparsifier.scope == "thresholds" and widest(self._inner, finisher) == "parameter":
            self.scope = "thresholds"
        # The plain sum of the task vectors, for a finisher that needs it.
        self._total: Merger | None = TaskArithmetic(1.0) if finisher is not None and finisher.uses_sum else None
        if self._total is not None and self.requires_score:
            raise ValueError(
                f"expected a finisher without the sum of the task vectors for {self._inner!r}, which scores candidates "
                f"before they are merged, got {finisher!r}; set its alpha"
            )
        if finisher is not None and self.requires_gradient:
            raise ValueError(
                f"expected no finisher after {self._inner!r}, which learns coefficients of the vector that it returns, "
                f"got {finisher!r}: finished, the vector would not be the one that was learned"
            )
        self._sparsify_with([])

    @override
    def threshold_rank(self, total: int) -> int:
        return super().threshold_rank(total) if self.sparsifier is None else self.sparsifier.threshold_rank(total)

    @override
    def with_thresholds(self, thresholds: Mapping[int, float]) -> Self:
        if self.sparsifier is None:
            return super().with_thresholds(thresholds)
        known = deepcopy(self)
        known.sparsifier = self.sparsifier.with_thresholds(thresholds)
        known.scope = widest(known._inner, known.sparsifier, known.finisher)
        known._sparsify_with([])
        return known

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
    def to(self, device: torch.device | str) -> Self:
        for part in self._parts():
            part.to(device)
        return super().to(device)

    @override
    def state_size(self, shapes: Shapes, num_tasks: int) -> int:
        return sum(part.state_size(shapes, num_tasks) for part in self._parts())

    @override
    def _sparsify_with(self, sparsifiers: list[Sparsifier]) -> bool:
        own = [] if self.sparsifier is None else [self.sparsifier]
        self._handed_down = self._inner._sparsify_with([*sparsifiers, *own])
        return self._handed_down

    def _parts(self) -> list[Merger]:
        """Return the mergers that hold the state."""
        return [self._inner] if self._total is None else [self._inner, self._total]

    @override
    def _fold_in(self, vector: State, shapes: Shapes, step: Step) -> None:
        if step.score is not None and self.finisher is not None:
            step = replace(step, score=self._score_finished(step.score))
        sparse = vector
        if self.sparsifier is not None and not self._handed_down:
            sparse = Sparsified(vector, self.sparsifier, step.task)
        # If one part refuses to remove a task, the other one must stay unchanged, too.
        before = deepcopy(self._parts()) if step.sign < 0 and self._total is not None else None
        try:
            self._inner._take(sparse, shapes, None, step if sparse is vector else replace(step, largest={}))
            if self._total is not None:
                self._total._take(vector, shapes, None, step)
        except BaseException:
            if before is not None:
                self._inner, self._total = before[0], before[1]
            raise

    @override
    def _float_dtypes(self) -> dict[str, torch.dtype]:
        return self._inner._float_dtypes()

    def _finished(self, vector: TaskVector) -> TaskVector:
        if self.finisher is None:
            return vector
        total = {} if self._total is None else self._total.compute()
        return self.finisher.finish_beside(vector, total, self.num_tasks)

    def _score_finished(self, score: Score) -> Score:
        return lambda vector: score(self._finished(vector))

    @override
    def _extras(self) -> dict[str, Any]:
        return {"parts": {str(index): part.state_dict() for index, part in enumerate(self._parts())}}

    @override
    def _load_extras(self, extras: dict[str, Any]) -> None:
        for index, part in enumerate(self._parts()):
            if extras:
                part.load_state_dict(extras["parts"][str(index)])
            else:
                part.reset()

    @override
    def _join_extras(self, other: Self) -> None:
        for ours, theirs in zip(self._parts(), other._parts(), strict=True):
            ours.merge_state(theirs)
