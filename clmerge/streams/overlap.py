"""Check that no image is in two splits of a stream."""

from __future__ import annotations

from collections.abc import Hashable

from clmerge.streams.files import FileImages
from clmerge.streams.plan import Split, StreamPlan
from clmerge.streams.sources import ImageSubset, LabelledImages


def require_disjoint(plan: StreamPlan) -> None:
    """Check that training, validation and test images of a stream are disjoint over all tasks.

    Images are identified by their file, or by their position in their array or data set; copies of files under other
    names are not found.

    Raises:
        ValueError: if an image is in two splits; the message names it.
    """
    owners: dict[Hashable, tuple[int, Split]] = {}
    # Training images come last and are only looked up, because there are many.
    splits: tuple[Split, ...] = ("test", "val", "train")
    for split in splits:
        for task, plans in enumerate(plan.splits):
            for index in plans[split].indices:
                key = _identity(plans[split].images, index)
                other = owners.get(key) if split == "train" else owners.setdefault(key, (task, split))
                if other is not None and other[1] != split:
                    where = plans[split].images.where(index)
                    raise ValueError(
                        f"expected different images in every split, got {where} among the {split} images of task "
                        f"{task + 1} and the {other[1]} images of task {other[0] + 1}"
                    )


def _identity(images: LabelledImages, index: int) -> Hashable:
    if isinstance(images, ImageSubset):
        return _identity(images.images, images.indices[index])
    return images.paths[index] if isinstance(images, FileImages) else (id(images), index)
