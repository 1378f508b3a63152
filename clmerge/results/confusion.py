"""Which classes a model takes for which: accuracies per class, and the confusion matrix, as counts of images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from clmerge.results.contract import Setting
from clmerge.results.measured import Measured

MOST_CLASSES = 2000  # largest number of classes for which pairs of classes are counted: 32 MB a model and reading


@dataclass(frozen=True)
class Confusion:
    """The answers of a finished model to the images of all tasks, by class.

    Classes are positions in ``Results.class_names``.

    Attributes:
        images: Number of images of every class.
        right: Number of images of every class that were classified rightly.
        wrong: ``(class, taken for, images)`` for every pair of classes with such images, in order; taken for is None
            where no class won, because the model has diverged or scores none. None if there are more than 2000 classes,
            whose pairs are not counted.

    Example:
        >>> found = Confusion([3, 1], [2, 1], [(0, 1, 1)])
        >>> found.accuracies
        [0.6666666666666666, 1.0]
        >>> found.matrix().tolist()
        [[2, 1], [0, 1]]
    """

    images: list[int]
    right: list[int]
    wrong: list[tuple[int, int | None, int]] | None

    @property
    def accuracies(self) -> list[float]:
        """Accuracy on every class, NaN for a class without images."""
        return [n / all_ if all_ else math.nan for n, all_ in zip(self.right, self.images, strict=True)]

    def matrix(self) -> NDArray[np.int64]:
        """Return the confusion matrix: images of a class (rows) by the class that they were taken for (columns).

        The images that no class won are in none of its columns.

        Raises:
            ValueError: If pairs of classes were not counted.
        """
        if self.wrong is None:
            raise ValueError(
                f"expected pairs of classes, got {len(self.images)} classes, for which they are not counted"
            )
        found = np.diag(np.array(self.right, dtype=np.int64))
        for true, taken, count in self.wrong:
            if taken is not None:
                found[true, taken] = count
        return found

    def worst(self, most: int) -> list[int]:
        """Return the classes with the lowest accuracies, lowest first; of equals those with more images.

        Args:
            most: Largest number of classes.
        """
        known = [index for index, count in enumerate(self.images) if count]
        accuracies = self.accuracies
        return sorted(known, key=lambda index: (accuracies[index], -self.images[index], index))[:most]

    def pairs(self, most: int) -> list[tuple[int, int, int]]:
        """Return the pairs of classes that were confused most often: class, taken for, images.

        Args:
            most: Largest number of pairs.
        """
        found = [(true, taken, count) for true, taken, count in self.wrong or () if taken is not None]
        return sorted(found, key=lambda pair: (-pair[2], pair[:2]))[:most]

    def most_confused(self, most: int) -> list[int]:
        """Return the classes that most wrong answers are about, as class or as answer, in the order of the classes.

        Args:
            most: Largest number of classes.
        """
        about = [count - right for count, right in zip(self.images, self.right, strict=True)]
        for _, taken, count in self.wrong or ():
            if taken is not None:
                about[taken] += count
        return sorted(sorted(range(len(about)), key=lambda index: (-about[index], index))[:most])

    def to_dict(self) -> dict[str, Any]:
        """Return the counts in the form of ``results.json``."""
        wrong = None if self.wrong is None else [list(each) for each in self.wrong]
        return {"images": list(self.images), "right": list(self.right), "wrong": wrong}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Confusion":
        """Rebuild the counts from ``results.json``, whose contract was checked."""
        wrong = document["wrong"]
        triples = None if wrong is None else [(true, taken, count) for true, taken, count in wrong]
        return cls(list(document["images"]), list(document["right"]), triples)

    @classmethod
    def of_counts(cls, counts: NDArray[np.int64], order: Sequence[int]) -> "Confusion":
        """Return the counts of :class:`clmerge.results.metrics.confusion.ConfusionCounts` for one reading.

        Args:
            counts: ``(C, C + 1)``: images by class id and by the id of the class that won, last where none did; or
                ``(C, 2)``: images that were classified rightly and wrongly.
            order: Class ids in the order of ``Results.class_names``; a class that is in no task has no place there,
                and counts as none where it won.
        """
        images = [int(counts[class_id].sum()) for class_id in order]
        if counts.shape[1] != counts.shape[0] + 1:
            return cls(images, [int(counts[class_id, 0]) for class_id in order], None)
        place = {class_id: index for index, class_id in enumerate(order)}
        wrong: list[tuple[int, int | None, int]] = []
        for index, class_id in enumerate(order):
            row: dict[int | None, int] = {}
            for column in np.flatnonzero(counts[class_id]).tolist():
                if column != class_id:
                    row[place.get(column)] = row.get(place.get(column), 0) + int(counts[class_id, column])
            wrong += [(index, taken, row[taken]) for taken in sorted(row, key=lambda t: len(order) if t is None else t)]
        return cls(images, [int(counts[class_id, class_id]) for class_id in order], wrong)


Confusions: TypeAlias = Mapping[Setting, Confusion]
"""The answers by reading of the logits; a model that must be told the task has no task-agnostic ones."""


class ModelRow(TypedDict):
    """What one pass over the images says of a model.

    ``task_agnostic`` and ``task_aware`` are one accuracy in [0, 1] per task, NaN where undefined; ``confusion``, the
    answers by class, is there where it was asked for; ``routing_accuracy``, the share of each task's images, layers and
    tokens that are routed to the task, where a model chooses among tasks; ``probes``, the findings of the probes that
    were asked for, by their names.
    """

    task_agnostic: list[float]
    task_aware: list[float]
    confusion: NotRequired[Confusions]
    routing_accuracy: NotRequired[list[float]]
    probes: NotRequired[dict[str, Measured]]


def summed(confusions: Sequence[Confusion]) -> Confusion:
    """Return the counts of several runs over the same classes together.

    Example:
        >>> summed([Confusion([2, 1], [1, 1], [(0, 1, 1)]), Confusion([2, 1], [2, 0], [(1, None, 1)])])
        Confusion(images=[4, 2], right=[3, 1], wrong=[(0, 1, 1), (1, None, 1)])
    """
    images, right = (
        [sum(values) for values in zip(*lists, strict=True)]
        for lists in ([each.images for each in confusions], [each.right for each in confusions])
    )
    if any(each.wrong is None for each in confusions):
        return Confusion(images, right, None)
    totals: dict[tuple[int, int | None], int] = {}
    for each in confusions:
        for true, taken, count in each.wrong or ():
            totals[true, taken] = totals.get((true, taken), 0) + count
    order = sorted(totals, key=lambda pair: (pair[0], pair[1] is None, pair[1] or 0))
    return Confusion(images, right, [(*pair, totals[pair]) for pair in order])
