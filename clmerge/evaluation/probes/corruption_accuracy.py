"""How often a model is right on corrupted images."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.evaluation.probes.probe import AccuracyProbe, Occasion, Seen, View
from clmerge.results.measured import Measured
from clmerge.streams import Stream
from clmerge.streams.plan import SplitPlan
from clmerge.streams.transforms import Corruption, changed
from clmerge.streams.transforms.corruptions import KINDS, Kind


class CorruptionAccuracy(AccuracyProbe):
    """Accuracy on test images with corruptions of ImageNet-C (arXiv 1903.12261), as the mean over the corruptions.

    ``values`` has the accuracy under every corruption, over the tasks learned so far. It is no mCE, which is relative
    to AlexNet's errors on ImageNet. Costs one pass over the test images per corruption.

    Args:
        corruptions: Which; default all six that clmerge has.
        severity: From 1 to 5.
        after: Measure after every task or the last.
        seed: Seed of the noise.

    Raises:
        ValueError: If none or an unknown corruption is named, or the severity is out of range.
    """

    name = "corruption_accuracy"
    better = "higher"
    sources = ("1903.12261",)

    def __init__(
        self,
        corruptions: list[Kind] | None = None,
        severity: int = 3,
        after: Literal["every", "last"] = "last",
        seed: int = 0,
    ) -> None:
        self.corruptions, self.severity, self.after, self.seed = corruptions, severity, after, seed
        kinds = list(KINDS) if corruptions is None else corruptions
        if not kinds:
            raise ValueError("expected one corruption or more, got none")
        self._changes = [Corruption(kind, severity, seed) for kind in dict.fromkeys(kinds)]

    @override
    def parts(self, stream: Stream) -> Mapping[str, Mapping[int, SplitPlan]]:
        plans = {task.index: stream.dataset(task.index, "test").plan for task in stream.tasks}
        return {change.kind: {task: changed(plan, change) for task, plan in plans.items()} for change in self._changes}

    @override
    def hits(self, view: View) -> Tensor:
        return view.scores.argmax(dim=1) == view.labels

    @override
    def summary(self, seen: Mapping[str, Seen], occasion: Occasion) -> Measured:
        found = {kind: one.per_task(one.rows[:, 0], occasion.num_tasks) for kind, one in seen.items()}
        by_kind = torch.tensor([accuracies for accuracies, _ in found.values()], dtype=torch.float64)
        per_task = by_kind.mean(dim=0).tolist()
        values = {kind: occasion.mean_over_seen(accuracies) for kind, (accuracies, _) in found.items()}
        value = sum(values.values()) / len(values) if values else math.nan
        return Measured(value, per_task, values, next(iter(found.values()))[1])
