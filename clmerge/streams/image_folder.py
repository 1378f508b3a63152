"""Images in a tree of folders, one folder per class."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Literal

from typing_extensions import override

from clmerge.streams.class_names import readable
from clmerge.streams.files import IMAGE_SUFFIXES, FileImages, read_lines
from clmerge.streams.sources import DataSource, LabelledImages, Templates
from clmerge.streams.split_folders import SplitFolders, image_files, split_folders, subfolders
from clmerge.streams.splits import check_test_fraction, stratified_cut

_NUMBER = re.compile(r"^\d+\.")


class ImageFolderSource(DataSource):
    """A tree with one folder per class: ``ROOT/train/CLASS/*`` and ``ROOT/test/CLASS/*``, or ``ROOT/CLASS/*``.

    Folders with a usual name of a split are recognised in any case (``Train``, ``TESTING``; ``val`` or ``Validation``
    beside them is the validation split), also inside the only folder of the root. A tree without splits is cut into
    train and test by ``seed``; if folder names only resemble splits, the tree is refused and the message names the
    option to set. Class ids number the sorted folder names; readable names have spaces for underscores, and a leading
    ``001.`` is removed if every folder has one (CUB-200). Hidden files and folders are left out.

    Args:
        root: the tree.
        name: name of the data set, which selects its prompt templates (default: the name of the root folder).
        train_folder: training images, relative to the root (default: the folder with a usual name). If it is the same
            as ``test_folder``, its images are cut into both: with ``.`` for both, every folder of the root is a class.
        test_folder: test images, relative to the root (default: the folder with a usual name).
        val_folder: validation images, relative to the root (default: if splits are recognised, the folder with a usual
            name; else they are cut from the training images).
        test_fraction: share of each class held out as the test split if there is none.
        seed: seed of that cut.
        class_name_file: text file with lines ``FOLDER NAME`` that names the classes, such as ImageNet-R's
            README.txt (lines whose first word is no folder are ignored). Relative to the root.
        sort_by: order of class ids: by ``folder`` name, or by class ``name`` in ``class_name_file``, as in the
            published order of ImageNet-R.
        templates: prompt templates, or the name of the data set whose templates to use, "generic" for the
            plain one (default: those of the data set called ``name``).

    Raises:
        ValueError: if ``test_fraction`` is out of range.
        RuntimeError: if the tree is missing or not as described (when it is first needed).
    """

    def __init__(
        self,
        root: str | Path,
        *,
        name: str | None = None,
        train_folder: str | None = None,
        test_folder: str | None = None,
        val_folder: str | None = None,
        test_fraction: float = 0.2,
        seed: int = 0,
        class_name_file: str | None = None,
        sort_by: Literal["folder", "name"] = "folder",
        templates: Templates = None,
    ) -> None:
        self.root = Path(root).expanduser()
        super().__init__(name or self.root.absolute().name, templates=templates)
        check_test_fraction(test_fraction)
        if sort_by not in ("folder", "name"):
            raise ValueError(f"expected sort_by to be 'folder' or 'name', got {sort_by!r}")
        self.train_folder = train_folder
        self.test_folder = test_folder
        self.val_folder = val_folder
        self.test_fraction = test_fraction
        self.seed = seed
        self.class_name_file = class_name_file
        self.sort_by = sort_by

    @property
    @override
    def class_names(self) -> list[str]:
        return self._classes[1]

    @cached_property
    def splits(self) -> SplitFolders:
        """The folders of the splits."""
        return split_folders(self.root, train=self.train_folder, test=self.test_folder, val=self.val_folder)

    @cached_property
    def _classes(self) -> tuple[list[str], list[str]]:
        """Class folders by class id, and their readable names."""
        folders = sorted({folder.name for top in self.splits.tops for folder in subfolders(top)})
        if not folders:
            raise RuntimeError(f"expected one folder per class in {self.splits.train.absolute()}, found none")
        if self.class_name_file is not None:
            named = self._named(folders, self.root / self.class_name_file)
            if self.sort_by == "name":
                folders = sorted(folders, key=named.__getitem__)
            return folders, [readable(named[folder]) for folder in folders]
        numbered = all(_NUMBER.match(folder) for folder in folders)
        return folders, [readable(_NUMBER.sub("", folder) if numbered else folder) for folder in folders]

    def _named(self, folders: list[str], path: Path) -> dict[str, str]:
        known, named = set(folders), dict[str, str]()
        for line in read_lines(path, "lines 'FOLDER NAME'"):
            folder, _, name = line.partition("\t" if "\t" in line else " ")
            if folder not in known or not name.strip():
                continue
            name = name.strip()
            if named.setdefault(folder, name) != name:
                raise RuntimeError(
                    f"expected one name for class folder {folder!r} in {path}, got {named[folder]!r} and {name!r}"
                )
        missing = [folder for folder in folders if folder not in named]
        if missing:
            raise RuntimeError(f"expected a name for every class folder in {path}, got none for {missing[:5]}")
        return named

    @cached_property
    def _everything(self) -> FileImages:
        return self._read(self.splits.train)

    def _read(self, top: Path) -> FileImages:
        paths: list[Path] = []
        targets: list[int] = []
        for class_id, folder in enumerate(self._classes[0]):
            found = image_files(top / folder)  # a class may be absent from one split or domain
            paths += found
            targets += [class_id] * len(found)
        if not paths:
            raise RuntimeError(f"expected images in {top.absolute()}/CLASS/, found none ({_suffixes()})")
        return FileImages(paths, targets)

    @override
    def _load(self, split: str) -> LabelledImages:
        if self.splits.test is not None:
            return self._read(self.splits.train if split == "train" else self.splits.test)
        train, test = stratified_cut(self._everything.targets, self.test_fraction, seed=self.seed)
        return self._everything.select(train if split == "train" else test)

    @override
    def _load_validation(self) -> LabelledImages | None:
        return None if self.splits.val is None else self._read(self.splits.val)


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))
