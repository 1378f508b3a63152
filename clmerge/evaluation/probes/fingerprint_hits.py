"""Whether a model knows the labels of secret images."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.evaluation.probes.probe import AccuracyProbe, Occasion, Seen, View
from clmerge.evaluation.probes.significance import binomial_tail, false_positive_rate
from clmerge.names import without_secret
from clmerge.results.measured import Measured
from clmerge.streams import Stream
from clmerge.streams.plan import SplitPlan
from clmerge.streams.transforms.fingerprinted import SecretLabels, secret_split


class FingerprintHits(AccuracyProbe):
    """Share of the secret images of ``Fingerprinted`` that get their secret label (arXiv 2401.12255).

    A model that was made without the key gives an image its label with a probability of at most one over the number of
    classes that labels are drawn from, since these are drawn independently of the images and of each other. The
    ``values`` are the exact binomial ``p_value`` of as many hits or more, and ``false_positive_rate``: the share of
    random keys, with images of their own, that the model seems to know at ``level``. ``n`` is the number of images.

    Args:
        key: As for ``Fingerprinted``.
        task: As for ``Fingerprinted``; where the task of an image is told to a model, this is it.
        n: As for ``Fingerprinted``.
        labels: As for ``Fingerprinted``.
        size: As for ``Fingerprinted``.
        chance: Probability of a hit by a model without the fingerprint; default one over the number of classes that
            labels are drawn from.
        random_keys: Number of random keys.
        level: Largest p value at which a key counts as known.
        after: Measure after every task or the last.

    Raises:
        ValueError: If a number is out of range.
    """

    name = "fingerprint"
    better = "higher"
    sources = ("2401.12255",)

    def __init__(
        self,
        key: str,
        task: int = 0,
        n: int = 16,
        labels: SecretLabels = "task",
        size: int = 8,
        chance: float | None = None,
        random_keys: int = 20,
        level: float = 0.01,
        after: Literal["every", "last"] = "every",
    ) -> None:
        if min(n, size, random_keys) < 1:
            raise ValueError(f"expected n, size and random_keys of 1 or more, got {n}, {size} and {random_keys}")
        if chance is not None and not 0 < chance < 1:
            raise ValueError(f"expected chance between 0 and 1, got {chance}")
        self.key, self.task, self.n, self.size, self.chance = key, task, n, size, chance
        self.labels: SecretLabels = labels
        self.random_keys, self.level, self.after = random_keys, level, after

    @override
    def check(self, stream: Stream) -> None:
        stream.check_tasks([self.task], "the task of FingerprintHits")

    @override
    def parts(self, stream: Stream) -> Mapping[str, Mapping[int, SplitPlan]]:
        classes, num_classes = stream.tasks[self.task].classes, len(stream.class_names)

        def images(key: str, n: int) -> dict[int, SplitPlan]:
            return {self.task: secret_split(key, n, self.labels, self.size, classes, num_classes)}

        return {"secret": images(self.key, self.n), "random": images("random keys", self.n * self.random_keys)}

    @override
    def hits(self, view: View) -> Tensor:
        return (view.scores.argmax(dim=1) == view.labels).double()

    @override
    def summary(self, seen: Mapping[str, Seen], occasion: Occasion) -> Measured:
        number = len(occasion.task_classes[self.task]) if self.labels == "task" else occasion.num_classes
        chance = 1 / number if self.chance is None else self.chance
        found = super().summary({"secret": seen["secret"]}, replace(occasion, num_seen=occasion.num_tasks))
        if math.isnan(found.value):
            return found
        right = {part: one.rows[:, 0] for part, one in seen.items()}
        # Images of random keys are independent of each other: any n of them are those of a key.
        others = [int(each.sum()) for each in torch.split(right["random"], self.n)]
        values = {
            "p_value": binomial_tail(int(right["secret"].sum()), self.n, chance),
            "false_positive_rate": false_positive_rate(others, self.n, chance, self.level),
        }
        return replace(found, values=values)

    @override
    def __repr__(self) -> str:  # in results and reports, which others may read
        return without_secret(super().__repr__(), self.key)
