"""Task-incremental streams: several data sets, each with its own classes."""

from __future__ import annotations

from collections import Counter

from typing_extensions import override

from clmerge.streams.layout import ValidationCut
from clmerge.streams.multi_source import MultiSourceStream
from clmerge.streams.source_groups import SourceGroup
from clmerge.streams.sources import DataSource


class TaskIncremental(MultiSourceStream):
    """One task per data set, such as the eight-data-set suite; no class is shared.

    Class ids are offset from data set to data set. A class name that occurs in two data sets denotes two classes,
    shown as ``DATASET: NAME``; prompts use the plain name and each data set's own templates. The task of an image is
    known, so models are compared by task-aware accuracy by default.

    Args:
        sources: the data sets in order, or a description of them.
        name: short name of the stream, used in file names.
        seed: seed of the validation cut.
        val_fraction: share of each class's training images held out for validation; 0 for none. If a data set has
            its own validation split, that is used instead, unless this is 0.
        max_val: upper bound of the validation images of one task (default: no bound); task arithmetic
            (arXiv 2212.04089) uses a tenth of the training images and at most 5000.

    Raises:
        ValueError: if there are no sources, or one lacks images (when the data is first read).
    """

    kind = "task-incremental"
    evaluation = "task_aware"

    def __init__(
        self,
        sources: list[DataSource] | SourceGroup,
        *,
        name: str = "datasets",
        seed: int = 0,
        val_fraction: float = 0.1,
        max_val: int | None = None,
    ) -> None:
        super().__init__(sources, name, ValidationCut(val_fraction, max_val, seed))

    @override
    def _classes(self) -> tuple[list[str], list[dict[int, int]], list[tuple[int, int]]]:
        plain = Counter(name for source in self.sources for name in source.class_names)
        class_names: list[str] = []
        to_global: list[dict[int, int]] = []
        origins: list[tuple[int, int]] = []
        for index, source in enumerate(self.sources):
            offset = len(class_names)
            to_global.append({label: offset + label for label in range(len(source.class_names))})
            origins += [(index, label) for label in range(len(source.class_names))]
            class_names += [name if plain[name] == 1 else f"{source.name}: {name}" for name in source.class_names]
        return class_names, to_global, origins
