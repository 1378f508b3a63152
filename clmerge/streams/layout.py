"""Lay out the train, validation and test split of one task from chosen samples of a source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clmerge.streams.plan import Split, SplitPlan
from clmerge.streams.sources import DataSource, LabelledImages
from clmerge.streams.splits import stratified_cut


@dataclass(frozen=True)
class ValidationCut:
    """How validation images are chosen.

    Args:
        fraction: share of each class's training images; 0 for no validation images.
        max_images: upper bound per task; None for no bound.
        seed: seed of the choice.

    Raises:
        ValueError: if the fraction is outside ``[0, 1)`` or the bound is below 1.
    """

    fraction: float
    max_images: int | None
    seed: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.fraction < 1.0:
            raise ValueError(f"expected val_fraction in [0, 1), got {self.fraction}")
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(f"expected max_val of 1 or more, got {self.max_images}: for none, set val_fraction to 0")

    def splits(
        self,
        source: DataSource,
        *,
        train: Sequence[int],
        test: Sequence[int],
        to_global: Mapping[int, int],
    ) -> dict[Split, SplitPlan]:
        """Lay out the three splits of one task.

        Args:
            source: the source of the images.
            train: positions of the task's samples in the source's training images.
            test: positions of the task's samples in the source's test images.
            to_global: global class id of each of the task's labels in the source.
        """
        images = source.train()
        official = source.val() if self.fraction > 0 else None
        if official is not None:
            kept = list(train)
            held = [index for index, target in enumerate(official.targets) if target in to_global]
            val = split_plan(official, held, to_global)
        else:
            stay, out = stratified_cut(
                [images.targets[index] for index in train],
                self.fraction,
                seed=self.seed,
                max_held=self.max_images,
            )
            kept = [train[position] for position in stay]
            val = split_plan(images, [train[position] for position in out], to_global)
        return {
            "train": split_plan(images, kept, to_global),
            "val": val,
            "test": split_plan(source.test(), test, to_global),
        }


def split_plan(images: LabelledImages, indices: Sequence[int], to_global: Mapping[int, int]) -> SplitPlan:
    """Plan one split: positions in the source's images and their global class ids."""
    return SplitPlan(images, tuple(indices), tuple(to_global[images.targets[index]] for index in indices))
