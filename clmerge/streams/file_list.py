"""Images listed in text files, the layout of DomainNet."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from typing_extensions import override

from clmerge.streams.class_names import readable
from clmerge.streams.files import FileImages, read_lines
from clmerge.streams.sources import DataSource, LabelledImages, Templates


class FileListSource(DataSource):
    """Images listed in two text files with lines ``relative/path/of/image.jpg LABEL``, DomainNet's layout.

    A class is named after the folder that holds its images. Class ids number, in ascending order, the labels that
    occur in the files.

    Args:
        root: folder that the paths are relative to.
        train_list: file that lists the training images, relative to the root.
        test_list: file that lists the test images, relative to the root.
        val_list: file that lists the validation images, relative to the root (default: they are cut from the training
            images).
        name: name of the data set, which selects its prompt templates (default: the name of the root folder).
        templates: prompt templates, or the name of the data set whose templates to use, "generic" for the
            plain one (default: those of the data set called ``name``).

    Raises:
        RuntimeError: if a list is missing or not as described (when first needed).
    """

    def __init__(
        self,
        root: str | Path,
        *,
        train_list: str,
        test_list: str,
        val_list: str | None = None,
        name: str | None = None,
        templates: Templates = None,
    ) -> None:
        self.root = Path(root).expanduser()
        super().__init__(name or self.root.absolute().name, templates=templates)
        self.train_list = train_list
        self.test_list = test_list
        self.val_list = val_list

    @property
    @override
    def class_names(self) -> list[str]:
        return list(self._classes.values())

    @cached_property
    def _entries(self) -> dict[str, list[tuple[str, int]]]:
        lists = {"train": self.train_list, "test": self.test_list, "val": self.val_list}
        return {split: self._read(name) for split, name in lists.items() if name is not None}

    @cached_property
    def _classes(self) -> dict[int, str]:
        """Class name by label, ascending."""
        folders: dict[int, str] = {}
        for path, label in (entry for entries in self._entries.values() for entry in entries):
            folder = Path(path).parent.name
            if folders.setdefault(label, folder) != folder:
                raise RuntimeError(
                    f"expected the images of label {label} in one folder name, got {folders[label]!r} and "
                    f"{folder!r} in the lists of {self.root}"
                )
        return {label: readable(folders[label]) for label in sorted(folders)}

    def _read(self, name: str) -> list[tuple[str, int]]:
        path = self.root / name
        entries: list[tuple[str, int]] = []
        for number, line in enumerate(read_lines(path, "a list of images with lines 'PATH LABEL'"), start=1):
            image, _, label = line.rpartition(" ")
            if not image or not label.isdecimal():
                raise RuntimeError(f"expected 'PATH LABEL' in line {number} of {path}, got {line!r}")
            entries.append((image.strip(), int(label)))
        return entries

    @override
    def _load(self, split: str) -> LabelledImages:
        class_ids = {label: class_id for class_id, label in enumerate(self._classes)}
        entries = self._entries[split]
        return FileImages([self.root / path for path, _ in entries], [class_ids[label] for _, label in entries])

    @override
    def _load_validation(self) -> LabelledImages | None:
        return None if self.val_list is None else self._load("val")
