"""Streams: where the images come from, and how they are cut into tasks.

A `DataSource` is one labelled data set, a `Stream` cuts one or several of them into tasks, and
`StreamDataModule` serves the tasks to a Lightning Trainer. Heavy packages (Avalanche, Lightning,
scikit-learn) are imported where they are first needed, so that building a stream on the command line costs
nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clmerge.streams.class_incremental import ClassIncremental
    from clmerge.streams.datamodule import StreamDataModule
    from clmerge.streams.digits import SklearnDigits
    from clmerge.streams.sources import DataSource, LabelledImages
    from clmerge.streams.stream import Stream, Task

_HOMES = {
    "ClassIncremental": "class_incremental",
    "DataSource": "sources",
    "LabelledImages": "sources",
    "SklearnDigits": "digits",
    "Stream": "stream",
    "StreamDataModule": "datamodule",
    "Task": "stream",
}

__all__ = [
    "ClassIncremental",
    "DataSource",
    "LabelledImages",
    "SklearnDigits",
    "Stream",
    "StreamDataModule",
    "Task",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
