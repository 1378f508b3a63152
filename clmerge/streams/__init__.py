"""Streams: data sources of images, and how they are cut into tasks.

A `DataSource` is one labelled data set, a `Stream` cuts one or several of them into tasks, and
`StreamDataModule` serves the tasks to a Lightning Trainer. Heavy packages (Avalanche, Lightning,
scikit-learn) are imported where they are first needed, so that building a stream on the command line is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clmerge.streams.adaptation import AdaptationBatch, AdaptationData
    from clmerge.streams.class_incremental import ClassIncremental
    from clmerge.streams.datamodule import StreamDataModule
    from clmerge.streams.digits import SklearnDigits
    from clmerge.streams.domain_incremental import DomainIncremental
    from clmerge.streams.file_list import FileListSource
    from clmerge.streams.from_avalanche import FromAvalanche
    from clmerge.streams.hugging_face import HuggingFaceSource
    from clmerge.streams.image_folder import ImageFolderSource
    from clmerge.streams.npz import NpzSource
    from clmerge.streams.plan import Task
    from clmerge.streams.source_groups import DomainFolders, DomainLists, PrefixDomains, SourceGroup
    from clmerge.streams.sources import DataSource, LabelledImages
    from clmerge.streams.stream import Stream
    from clmerge.streams.table_source import TableDomains, TableSource
    from clmerge.streams.tar_source import WebDatasetSource
    from clmerge.streams.task_incremental import TaskIncremental
    from clmerge.streams.torchvision_source import TorchvisionSource

_HOMES = {
    "AdaptationBatch": "adaptation",
    "AdaptationData": "adaptation",
    "ClassIncremental": "class_incremental",
    "DataSource": "sources",
    "DomainFolders": "source_groups",
    "DomainIncremental": "domain_incremental",
    "DomainLists": "source_groups",
    "FileListSource": "file_list",
    "FromAvalanche": "from_avalanche",
    "HuggingFaceSource": "hugging_face",
    "ImageFolderSource": "image_folder",
    "LabelledImages": "sources",
    "NpzSource": "npz",
    "PrefixDomains": "source_groups",
    "SklearnDigits": "digits",
    "SourceGroup": "source_groups",
    "Stream": "stream",
    "StreamDataModule": "datamodule",
    "TableDomains": "table_source",
    "TableSource": "table_source",
    "Task": "stream",
    "TaskIncremental": "task_incremental",
    "TorchvisionSource": "torchvision_source",
    "WebDatasetSource": "tar_source",
}

__all__ = [
    "AdaptationBatch",
    "AdaptationData",
    "ClassIncremental",
    "DataSource",
    "DomainFolders",
    "DomainIncremental",
    "DomainLists",
    "FileListSource",
    "FromAvalanche",
    "HuggingFaceSource",
    "ImageFolderSource",
    "LabelledImages",
    "NpzSource",
    "PrefixDomains",
    "SklearnDigits",
    "SourceGroup",
    "Stream",
    "StreamDataModule",
    "TableDomains",
    "TableSource",
    "Task",
    "TaskIncremental",
    "TorchvisionSource",
    "WebDatasetSource",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
