"""Whether a model tells the images that it was trained on from others of the same classes."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.evaluation.probes.probe import ImageProbe, Occasion, Seen, View
from clmerge.results.measured import Measured
from clmerge.streams import Stream
from clmerge.streams.images import ImageDataset, subset
from clmerge.streams.plan import SplitPlan
from clmerge.streams.splits import derived_seed

MEMBERS, OTHERS = "members", "others"


class MembershipInference(ImageProbe):
    """How well the loss tells training images of some tasks from their test images (arXiv 1709.01604).

    The value is the mean over these tasks, of those learned so far, of the area under the curve of the attack that
    takes images with a small loss for members: the share of pairs of a training and a test image of the task in which
    the training image has the smaller loss, ties half. 0.5 is no trace. Both splits may differ by chance, so compare
    with a model that was never trained on the task, as ``clmerge forget`` does, and not with 0.5.

    Args:
        tasks: Indices of the tasks; default all of the stream.
        images: At most so many training and so many test images of every task, drawn by a fixed seed.
        after: Measure after every task or the last.

    Raises:
        ValueError: If ``images`` is below 1.
    """

    name = "membership_inference"
    better = "lower"
    sources = ("1709.01604",)

    def __init__(
        self, tasks: list[int] | None = None, images: int = 1000, after: Literal["every", "last"] = "every"
    ) -> None:
        if images < 1:
            raise ValueError(f"expected images of 1 or more, got {images}")
        self.tasks, self.images, self.after = tasks, images, after

    @override
    def check(self, stream: Stream) -> None:
        stream.check_tasks(self.tasks or (), "tasks of MembershipInference")

    @override
    def parts(self, stream: Stream) -> Mapping[str, Mapping[int, SplitPlan]]:
        tasks: Sequence[int] = range(len(stream.tasks)) if self.tasks is None else self.tasks
        return {
            MEMBERS: {task: self._some(stream.dataset(task, "train"), task) for task in tasks},
            OTHERS: {task: self._some(stream.dataset(task, "test"), task) for task in tasks},
        }

    def _some(self, images: ImageDataset, task: int) -> SplitPlan:
        if len(images) <= self.images:
            return images.plan
        drawn = random.Random(derived_seed("membership", task)).sample(range(len(images)), self.images)
        return subset(images, sorted(drawn)).plan

    @override
    def look(self, view: View) -> Tensor:
        """Return the negative loss of every image, in nats."""
        return view.scores.double().log_softmax(dim=1).gather(1, view.labels.unsqueeze(1))

    @override
    def summary(self, seen: Mapping[str, Seen], occasion: Occasion) -> Measured:
        per_task, n = [], []
        for task in range(occasion.num_tasks):
            members, others = (seen[part].rows[seen[part].tasks == task, 0] for part in (MEMBERS, OTHERS))
            per_task.append(area_under_curve(members, others))
            n.append(len(members) + len(others))
        return Measured(occasion.mean_over_seen(per_task), per_task, n=n)


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """Return the share of pairs whose positive has the larger score, ties half; NaN without a pair.

    Args:
        positive: Scores ``(P,)``.
        negative: Scores ``(N,)``.

    Example:
        >>> area_under_curve(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]))
        0.625
    """
    if not len(positive) or not len(negative):
        return math.nan
    ordered = negative.sort().values
    wins = sum(int(torch.searchsorted(ordered, positive.contiguous(), right=right).sum()) for right in (False, True))
    return wins / (2 * len(positive) * len(negative))
