"""Domain-incremental streams: the same classes, one domain per task."""

from __future__ import annotations

from typing_extensions import override

from clmerge.streams.layout import ValidationCut
from clmerge.streams.multi_source import MultiSourceStream
from clmerge.streams.source_groups import SourceGroup
from clmerge.streams.sources import DataSource


class DomainIncremental(MultiSourceStream):
    """One task per domain over one common set of classes, matched by name.

    The classes of the stream are the union of the domains' class names, sorted; the classes of a task are
    those with training images in its domain. A class's prompts come from the first domain that has it.

    Args:
        sources: one data source per domain, or a description of them such as ``DomainLists``.
        name: short name of the stream, used in file names.
        seed: seed of the validation cut.
        val_fraction: share of each class's training images held out for validation, domain by domain; 0 for
            none. If a data set has its own validation split, that is used instead, unless this is 0.
        max_val: upper bound of the validation images of one task (default: no bound).

    Raises:
        ValueError: if there are no sources, or one lacks images (when the data is first read).
    """

    kind = "domain-incremental"

    def __init__(
        self,
        sources: list[DataSource] | SourceGroup,
        *,
        name: str = "domains",
        seed: int = 0,
        val_fraction: float = 0.1,
        max_val: int | None = None,
    ) -> None:
        super().__init__(sources, name, ValidationCut(val_fraction, max_val, seed))

    @override
    def _classes(self) -> tuple[list[str], list[dict[int, int]], list[tuple[int, int]]]:
        class_names = sorted({name for source in self.sources for name in source.class_names})
        ids = {name: class_id for class_id, name in enumerate(class_names)}
        to_global: list[dict[int, int]] = []
        origins: dict[int, tuple[int, int]] = {}
        for index, source in enumerate(self.sources):
            labels = {label: ids[name] for label, name in enumerate(source.class_names)}
            if len(set(labels.values())) < len(labels):
                raise ValueError(f"expected different class names in {source.name}, got {source.class_names}")
            to_global.append(labels)
            for label, class_id in labels.items():
                origins.setdefault(class_id, (index, label))
        return class_names, to_global, [origins[class_id] for class_id in range(len(class_names))]
