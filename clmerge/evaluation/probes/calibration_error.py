"""How far a model's confidence is from its accuracy."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.evaluation.probes.probe import TEST, ImageProbe, Occasion, Seen, View
from clmerge.results.measured import Measured


class CalibrationError(ImageProbe):
    """Expected calibration error of the test images of every task (Guo et al., arXiv 1706.04599).

    The mean over equally wide bins of the confidence, weighted by their images, of ``|accuracy - confidence|``. Its
    ``values`` are ``nll`` (mean negative log likelihood, nats), ``brier`` (mean squared distance of the probabilities
    from the label, 0 to 2), ``confidence``, and ``selective_accuracy`` of the half of the images answered with most
    confidence. All are over the images of the tasks learned so far.

    Args:
        bins: Number of bins.
        after: Measure after every task or the last.

    Raises:
        ValueError: If there is no bin.
    """

    name = "calibration_error"
    better = "lower"
    sources = ("1706.04599",)

    def __init__(self, bins: int = 15, after: Literal["every", "last"] = "every") -> None:
        if bins < 1:
            raise ValueError(f"expected bins of 1 or more, got {bins}")
        self.bins, self.after = bins, after

    @override
    def look(self, view: View) -> Tensor:
        log_probabilities = view.scores.double().log_softmax(dim=1)
        probabilities = log_probabilities.exp()
        confidence, answer = probabilities.max(dim=1)
        of_label = log_probabilities.gather(1, view.labels.unsqueeze(1))[:, 0]
        brier = probabilities.square().sum(dim=1) - 2 * of_label.exp() + 1
        return torch.stack([confidence, (answer == view.labels).double(), -of_label, brier], dim=1)

    @override
    def summary(self, seen: Mapping[str, Seen], occasion: Occasion) -> Measured:
        rows, tasks = seen[TEST].rows, seen[TEST].tasks
        per_task = [self._error(rows[tasks == task]) for task in range(occasion.num_tasks)]
        counts = [int((tasks == task).sum()) for task in range(occasion.num_tasks)]
        known = rows[tasks < occasion.num_seen]
        surest = known[known[:, 0].argsort(descending=True, stable=True)[: -(-len(known) // 2)]]
        values = {
            "nll": _mean(known[:, 2]),
            "brier": _mean(known[:, 3]),
            "confidence": _mean(known[:, 0]),
            "selective_accuracy": _mean(surest[:, 1]),
        }
        return Measured(self._error(known), per_task, values, counts)

    def _error(self, rows: Tensor) -> float:
        if not len(rows):
            return math.nan
        # Bins are (k/bins, (k+1)/bins]; a confidence of 0 is in the first.
        bins = (rows[:, 0] * self.bins).ceil().long().clamp(1, self.bins) - 1
        gaps = torch.zeros(self.bins, dtype=torch.float64).index_add_(0, bins, rows[:, 1] - rows[:, 0])
        return float(gaps.abs().sum() / len(rows))


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan
