"""Corrupt the images of some splits of a stream."""

from __future__ import annotations

from dataclasses import replace

from typing_extensions import override

from clmerge.streams.plan import Split, StreamPlan
from clmerge.streams.transforms.changes import ImageChange
from clmerge.streams.transforms.corruptions import Corruption
from clmerge.streams.transforms.transform import StreamTransform, changed, check_tasks


class Corrupted(StreamTransform):
    """Change all images of some splits and tasks: by default the test images, so that a run is judged under a shift.

    Args:
        change: What is done to an image; default Gaussian noise of severity 3.
        splits: Which splits; with all three the model is trained on changed images, too.
        tasks: Indices of the tasks; default all.

    Raises:
        ValueError: If no split is named.
    """

    def __init__(
        self,
        change: ImageChange | None = None,
        splits: list[Split] | None = None,
        tasks: list[int] | None = None,
    ) -> None:
        self.change = change or Corruption("gaussian_noise")
        self.splits: list[Split] = ["test"] if splits is None else splits
        self.tasks = tasks
        if not self.splits:
            raise ValueError("expected one split or more of train, val and test, got none")

    @override
    def apply(self, plan: StreamPlan) -> StreamPlan:
        check_tasks(self.tasks or (), len(plan.tasks), "tasks of Corrupted")
        splits = [
            {split: changed(own, self.change) if split in self.splits else own for split, own in parts.items()}
            if self.tasks is None or task in self.tasks
            else parts
            for task, parts in enumerate(plan.splits)
        ]
        return replace(plan, splits=tuple(splits))
