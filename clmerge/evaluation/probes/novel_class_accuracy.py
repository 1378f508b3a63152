"""What a model makes of classes that it was never trained on."""

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from clmerge.evaluation.probes.held_out_accuracy import check_held_out
from clmerge.evaluation.probes.probe import NO_TASK, ImageProbe, Occasion, Seen, View
from clmerge.results.measured import Measured
from clmerge.streams import Stream
from clmerge.streams.plan import SplitPlan


class NovelClassAccuracy(ImageProbe):
    """Accuracy on old and novel classes that all compete, and how well answers cluster images of novel classes.

    Novel classes are those of the tasks that ``HeldOut`` has taken out, old ones those of the tasks learned so far.
    ``values``: ``old`` and ``novel`` accuracy; ``clustering``, the accuracy of k-means over the logits of the novel
    images, with as many clusters as novel classes, under the best assignment of clusters to classes (Hungarian
    matching, as in novel class discovery, arXiv 2403.03382). The value is the harmonic mean of old and novel
    (generalised zero-shot learning, arXiv 1707.00600); it is undefined for a head that does not know the novel
    classes, which has ``clustering`` alone.

    Args:
        after: Measure after every task or the last.
        seed: Seed of k-means.
    """

    name = "novel_class_accuracy"
    better = "higher"
    sources = ("1707.00600", "2403.03382")

    def __init__(self, after: Literal["every", "last"] = "every", seed: int = 0) -> None:
        self.after, self.seed = after, seed

    @override
    def check(self, stream: Stream) -> None:
        check_held_out(stream, type(self).__name__)
        learned = {label for task in stream.tasks for label in task.classes}
        novel = {label for task in stream.held_out for label in task.classes}
        if both := sorted(learned & novel):
            raise ValueError(
                f"expected classes of held-out tasks to be in no other task, for {type(self).__name__}, got class "
                f"{stream.class_names[both[0]]!r}; HeldOutAccuracy is for domains"
            )

    @override
    def parts(self, stream: Stream) -> Mapping[str, Mapping[int, SplitPlan]]:
        old = {task.index: stream.dataset(task.index, "test").plan for task in stream.tasks}
        # One part for each: a part has one set of images per task.
        novel = {f"novel {task.index}": {NO_TASK: stream.held_out_plan(task.index, "test")} for task in stream.held_out}
        return {"old": old, **novel}

    @override
    def look(self, view: View) -> Tensor:
        hit = view.scores.argmax(dim=1) == view.labels
        known = view.scores.gather(1, view.labels.unsqueeze(1))[:, 0].isfinite()
        return torch.cat([torch.stack([hit, known, view.labels], dim=1).double(), view.scores.double()], dim=1)

    @override
    def summary(self, seen: Mapping[str, Seen], occasion: Occasion) -> Measured:
        old = seen["old"].rows[seen["old"].tasks < occasion.num_seen]
        novel = torch.cat([one.rows for part, one in seen.items() if part != "old"])
        of_old = float(old[:, 0].mean()) if len(old) else math.nan
        of_novel = float(novel[:, 0].mean()) if len(novel) and bool(novel[:, 1].all()) else math.nan
        total = of_old + of_novel
        harmonic = 2 * of_old * of_novel / total if total > 0 else total  # 0 if both are, NaN if one is undefined
        values = {"old": of_old, "novel": of_novel, "clustering": self._clustering(novel)}
        return Measured(harmonic, (), values, {"old": len(old), "novel": len(novel)})

    def _clustering(self, rows: Tensor) -> float:
        from sklearn.cluster import KMeans

        labels, scores = rows[:, 2].long().numpy(), rows[:, 3:]
        scores = scores[:, scores.isfinite().all(dim=0)]
        count = len(set(labels.tolist()))
        if len(rows) < 2 or not scores.shape[1]:
            return math.nan
        clusters = KMeans(count, n_init=10, random_state=self.seed).fit_predict(scores.numpy())
        return clustering_accuracy(labels, clusters)


def clustering_accuracy(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Return the share of images in the right cluster, under the best one-to-one assignment of clusters to classes.

    Args:
        labels: Class of every image, integers.
        clusters: Cluster of every image, integers.

    Example:
        >>> clustering_accuracy(np.array([3, 3, 3, 5]), np.array([0, 0, 1, 1]))
        0.75
    """
    from scipy.optimize import linear_sum_assignment

    classes, own = np.unique(labels, return_inverse=True)
    groups, found = np.unique(clusters, return_inverse=True)
    counts = np.zeros((len(classes), len(groups)), dtype=np.int64)
    np.add.at(counts, (own, found), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / len(labels))
