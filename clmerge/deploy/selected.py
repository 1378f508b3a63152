"""Predictors whose classes are chosen among, or put in another order than, those of the head."""

from collections.abc import Sequence, Set

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.deploy.predictors import Compute, Place, Predictor


class Selected(Predictor):
    """Score some of a predictor's classes, in another order; a class may stand in several places.

    Args:
        inner: The predictor.
        columns: For every class of this predictor, the class of ``inner``.
        tasks: For every task of the images, the task of ``inner``; default the same ones.

    Example:
        >>> from clmerge.deploy.predictors import Merged
        >>> chosen = Selected(Merged({"w": torch.tensor([[1.0, 2.0, 3.0]])}), [2, 0])
        >>> _ = chosen.prepare(lambda make: make())
        >>> chosen.scores(lambda state: state["w"], torch.tensor([0]))
        tensor([[3., 1.]])
    """

    def __init__(self, inner: Predictor, columns: Sequence[int], tasks: Sequence[int] | None = None) -> None:
        self.inner = inner
        self.columns = torch.tensor(columns)
        self.tasks = None if tasks is None else torch.tensor(tasks)
        self.needs_task = inner.needs_task

    @override
    def knows(self, task: int) -> bool:
        return self.inner.knows(task if self.tasks is None else int(self.tasks[task]))

    @override
    def prepare(self, place: Place) -> Set[str]:
        return self.inner.prepare(place)

    @override
    def scores(self, compute: Compute, tasks: Tensor) -> Tensor:
        own = tasks if self.tasks is None else self.tasks.to(tasks.device)[tasks]
        found = self.inner.scores(compute, own)
        return found[:, self.columns.to(found.device)]
