"""The domains of one data set as a list of sources."""

from __future__ import annotations

import json
import shlex
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

from typing_extensions import override

from clmerge.streams.file_list import FileListSource
from clmerge.streams.files import FileImages
from clmerge.streams.image_folder import ImageFolderSource
from clmerge.streams.orders import DOMAIN_ORDERS
from clmerge.streams.sources import DataSource, LabelledImages, Templates
from clmerge.streams.split_folders import Role, split_folders, subfolders, usual_splits

Domains: TypeAlias = Literal["magmax_domainnet", "magmax_imagenet_r"] | list[str]

_TRAIN_AND_TEST: tuple[Role, Role] = ("train", "test")


class SourceGroup(ABC):
    """Several data sources built from one description, in the order of their tasks."""

    @abstractmethod
    def sources(self) -> list[DataSource]:
        """Return the sources, each named after its domain."""


def domain_names(domains: Domains) -> list[str]:
    """Return the names of the domains in order.

    Args:
        domains: the names themselves, or the name of a published order.

    Raises:
        ValueError: if the order is unknown, a name repeats, or there is no name.
    """
    if isinstance(domains, str):
        if domains not in DOMAIN_ORDERS:
            raise ValueError(f"expected domains to be a list or one of {list(DOMAIN_ORDERS)}, got {domains!r}")
        return list(DOMAIN_ORDERS[domains])
    if not domains or len(set(domains)) != len(domains):
        raise ValueError(f"expected domains to be different names, at least one, got {domains}")
    return domains


class DomainFolders(SourceGroup):
    """A tree of domains: ``ROOT/DOMAIN/CLASS/*``, ``ROOT/DOMAIN/{train,test}/CLASS/*`` or the split on top.

    Usual names of splits are recognised as in `ImageFolderSource`.

    Args:
        root: the tree.
        domains: names of the domains in order, or the name of a published order; needed, because the order is yours to
            choose (without it, the error lists the folders).
        split_first: whether the tree is ``ROOT/{train,test}/DOMAIN/CLASS/*``.
        train_folder: name of the train folder (default: the one with a usual name).
        test_folder: name of the test folder (default: the one with a usual name).
        val_folder: name of the validation folder (default: the one with a usual name; without one, the images are cut
            from the training images).
        test_fraction: share of each class held out as the test split if there is no train folder.
        seed: seed of that cut.
        templates: prompt templates, or the name of the data set whose templates to use, e.g. "DomainNet".
    """

    def __init__(
        self,
        root: str | Path,
        *,
        domains: Domains | None = None,
        split_first: bool = False,
        train_folder: str | None = None,
        test_folder: str | None = None,
        val_folder: str | None = None,
        test_fraction: float = 0.2,
        seed: int = 0,
        templates: Templates = None,
    ) -> None:
        self.root = Path(root).expanduser()
        self.domains = None if domains is None else domain_names(domains)
        self.split_first = split_first
        self.train_folder = train_folder
        self.test_folder = test_folder
        self.val_folder = val_folder
        self.test_fraction = test_fraction
        self.seed = seed
        self.templates = templates

    @override
    def sources(self) -> list[DataSource]:
        if self.domains is None:
            raise ValueError(self._without_domains())
        return [self._split_first(domain) if self.split_first else self._source(domain) for domain in self.domains]

    def _without_domains(self) -> str:
        """Return the message for a tree whose domains were not named, with the option to paste."""
        top = self.root
        if self.split_first and top.is_dir():
            top = split_folders(top, train=self.train_folder, test=self.test_folder, val=self.val_folder).train
        found = [folder.name for folder in subfolders(top)] if top.is_dir() else []
        if not found:
            return f"expected folders of domains in {top.absolute()}, found none"
        if any(usual_splits(top).values()):
            return (
                f"expected domains, the names of the domains in order, got none; {top.absolute()} has folders of "
                f"splits ({', '.join(found[:5])}): set split_first=true if the domains are in them"
            )
        listed = "[" + ", ".join(json.dumps(name, ensure_ascii=False) for name in found) + "]"
        option = shlex.quote(f"--stream.sources.domains={listed}")
        return (
            f"expected domains, the names of the domains in the order in which they are learned, got none; "
            f"{top.absolute()} has {len(found)} folders. All of them by name: {option}"
        )

    def _source(self, domain: str) -> DataSource:
        folder = self.root / domain
        if (
            not folder.is_dir()
            and self.root.is_dir()
            and all(usual_splits(self.root)[role] for role in _TRAIN_AND_TEST)
        ):
            raise RuntimeError(
                f"expected a folder of domain {domain!r} in {self.root.absolute()}, found folders of splits: set "
                "split_first=true where the domains are in them"
            )
        return ImageFolderSource(
            folder,
            name=domain,
            train_folder=self.train_folder,
            test_folder=self.test_folder,
            val_folder=self.val_folder,
            test_fraction=self.test_fraction,
            seed=self.seed,
            templates=self.templates,
        )

    def _split_first(self, domain: str) -> DataSource:
        splits = split_folders(self.root, train=self.train_folder, test=self.test_folder, val=self.val_folder)
        if splits.test is None:
            raise RuntimeError(
                f"expected train and test folders in {self.root.absolute()}, as split_first says, found none: name "
                "them with train_folder and test_folder"
            )
        has_val = splits.val is not None and (splits.val / domain).is_dir()
        return ImageFolderSource(
            self.root,
            name=domain,
            train_folder=str((splits.train / domain).relative_to(self.root)),
            test_folder=str((splits.test / domain).relative_to(self.root)),
            val_folder=str((splits.val / domain).relative_to(self.root)) if has_val and splits.val else None,
            templates=self.templates,
        )


class DomainLists(SourceGroup):
    """Domains listed in text files, the layout of DomainNet: ``DOMAIN_train.txt`` and ``DOMAIN_test.txt``.

    Args:
        root: folder that holds the lists and the images they name.
        domains: names of the domains in order, or the name of a published order.
        train_list: name of a training list, ``{}`` stands for the domain.
        test_list: name of a test list, ``{}`` stands for the domain.
        val_list: name of a validation list, ``{}`` stands for the domain (default: the images are cut from the training
            images).
        templates: prompt templates, or the name of the data set whose templates to use.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        domains: Domains = "magmax_domainnet",
        train_list: str = "{}_train.txt",
        test_list: str = "{}_test.txt",
        val_list: str | None = None,
        templates: Templates = "DomainNet",
    ) -> None:
        for pattern in (train_list, test_list, val_list):
            if pattern is not None and "{}" not in pattern:
                raise ValueError(f"expected {{}} for the domain in the name of a list, got {pattern!r}")
        self.root = Path(root).expanduser()
        self.domains = domain_names(domains)
        self.train_list = train_list
        self.test_list = test_list
        self.val_list = val_list
        self.templates = templates

    @override
    def sources(self) -> list[DataSource]:
        return [
            FileListSource(
                self.root,
                train_list=self.train_list.replace("{}", domain),
                test_list=self.test_list.replace("{}", domain),
                val_list=None if self.val_list is None else self.val_list.replace("{}", domain),
                name=domain,
                templates=self.templates,
            )
            for domain in self.domains
        ]


class PrefixDomains(SourceGroup):
    """One folder tree whose file names begin with the domain, such as ImageNet-R's renditions (``art_0.jpg``).

    Args:
        source: the folder tree.
        domains: names of the domains in order, or the name of a published order; other images are left out.
        separator: text after the domain in a file name.
    """

    def __init__(
        self, source: ImageFolderSource, *, domains: Domains = "magmax_imagenet_r", separator: str = "_"
    ) -> None:
        self.source = source
        self.domains = domain_names(domains)
        self.separator = separator

    @override
    def sources(self) -> list[DataSource]:
        return [_PrefixSource(self.source, domain, self.separator) for domain in self.domains]


class _PrefixSource(DataSource):
    def __init__(self, source: ImageFolderSource, domain: str, separator: str) -> None:
        super().__init__(domain)
        self.source = source
        self.separator = separator

    @property
    @override
    def class_names(self) -> list[str]:
        return self.source.class_names

    @property
    @override
    def has_plain_templates(self) -> bool:
        return self.source.has_plain_templates

    @cached_property
    @override
    def templates(self) -> tuple[str, ...]:
        return self.source.templates

    @override
    def _load(self, split: str) -> LabelledImages:
        found = self._own(self.source.train() if split == "train" else self.source.test())
        if not len(found):
            raise RuntimeError(
                f"expected file names that begin with {self.name + self.separator!r} in the {split} split of "
                f"{self.source.root}, found none"
            )
        return found

    @override
    def _load_validation(self) -> LabelledImages | None:
        images = self.source.val()
        return None if images is None else self._own(images)

    def _own(self, images: LabelledImages) -> FileImages:
        assert isinstance(images, FileImages)
        prefix = self.name + self.separator
        return images.select([index for index, path in enumerate(images.paths) if path.name.startswith(prefix)])
