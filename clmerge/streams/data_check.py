"""Open every image of a stream before training, and leave unreadable ones out of a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from clmerge.shapes import count, listed, one_of, record, text
from clmerge.streams.decoding import UnreadableImageError
from clmerge.streams.images import ImageDataset
from clmerge.streams.plan import Split
from clmerge.streams.stream import Stream

RECORD = "data_check.json"
"""Name of the record in a run folder."""

_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_IMAGE = record({"task": count, "split": one_of(_SPLITS), "image": text, "reason": text})
_CONTRACT = record({"num_images": count, "unreadable": listed(_IMAGE)})
_FORK_ABOVE = 256
_AT_MOST = 16


@dataclass(frozen=True)
class UnreadableImage:
    """One image that cannot be read.

    Attributes:
        task: index of its task.
        split: its split.
        image: its origin, such as its file.
        reason: the error, in a sentence that names image and task.
    """

    task: int
    split: Split
    image: str
    reason: str


@dataclass(frozen=True)
class DataCheck:
    """The result of opening every image of a stream.

    Attributes:
        num_images: number of opened images.
        unreadable: unreadable images, in the order of tasks and splits.
    """

    num_images: int
    unreadable: tuple[UnreadableImage, ...]

    def save(self, path: Path) -> None:
        """Write the record as JSON; a run folder keeps it, so that a resumed run leaves out the same images."""
        from clmerge.weights import write_json_atomic

        found = [asdict(image) for image in self.unreadable]
        write_json_atomic(path, {"schema": 1, "num_images": self.num_images, "unreadable": found})

    @classmethod
    def load(cls, path: Path) -> DataCheck | None:
        """Read a record; return None if the file does not exist.

        Raises:
            ValueError: if the file is not such a record.
        """
        from clmerge.files import parse_json

        if not path.is_file():
            return None
        try:
            found = parse_json(path.read_bytes(), "something else")
            _CONTRACT(found, "")
            return cls(found["num_images"], tuple(UnreadableImage(**image) for image in found["unreadable"]))
        except (ValueError, TypeError) as error:
            raise ValueError(f"expected the record of a data check in {path}, which is damaged: {error}") from error


def check_images(stream: Stream, *, num_workers: int | None = None) -> DataCheck:
    """Decode every image of a stream, in parallel, with progress on stderr if that is a terminal.

    Args:
        stream: the stream.
        num_workers: processes that open images (default: one per CPU core, none for a few hundred images).
    """
    from rich.console import Console
    from rich.progress import track

    places = [(task.index, split) for task in stream.tasks for split in _SPLITS]
    parts = [_Reasons(stream.dataset(task, split)) for task, split in places]
    everything: Dataset[str] = ConcatDataset(parts)
    num_images = sum(map(len, parts))
    if num_workers is None:
        num_workers = min(os.cpu_count() or 1, _AT_MOST) if num_images > _FORK_ABOVE else 0
    loader = DataLoader(
        everything, batch_size=16, collate_fn=list, num_workers=num_workers, generator=torch.Generator()
    )
    console = Console(stderr=True)
    batches = track(loader, "opening images", console=console, disable=not sys.stderr.isatty(), transient=True)
    reasons = iter([reason for batch in batches for reason in batch])
    return DataCheck(num_images, tuple(_unreadable(places, parts, reasons)))


def _unreadable(
    places: Sequence[tuple[int, Split]], parts: Sequence[_Reasons], reasons: Iterator[str]
) -> Iterator[UnreadableImage]:
    for (task, split), part in zip(places, parts, strict=True):
        for index in range(len(part)):
            if reason := next(reasons):
                yield UnreadableImage(task, split, part.images.where(index), reason)


class _Reasons(Dataset[str]):
    """The reason why each image cannot be read; empty text for readable images."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> str:
        try:
            self.images.image(index)
        except UnreadableImageError as error:
            return str(error)
        return ""


def leave_out(stream: Stream, check: DataCheck) -> None:
    """Leave the unreadable images out of a stream.

    Args:
        stream: the stream; none of its images may have been served yet.
        check: the result of its check.

    Raises:
        ValueError: if an image is not in the stream, or a class of a task would be without training or test images.
    """
    for task in stream.tasks:
        for split in _SPLITS:
            bad = {image.image for image in check.unreadable if (image.task, image.split) == (task.index, split)}
            if not bad:
                continue
            images = stream.dataset(task.index, split)
            kept = [index for index in range(len(images)) if images.where(index) not in bad]
            if absent := bad - {images.where(index) for index in range(len(images))}:
                raise ValueError(
                    f"expected {min(absent)} among the {split} images of task {task.index + 1}, {task.name}, as a "
                    "record of unreadable images says, got no such image: other data?"
                )
            lost = set(images.targets) - {images.targets[index] for index in kept}
            if lost and split != "val":
                raise ValueError(
                    f"expected readable {split} images of class {stream.class_names[min(lost)]!r} in task "
                    f"{task.index + 1}, {task.name}, got none that can be read: mend {min(bad)} or take the class out"
                )
            stream.keep(task.index, split, kept)
