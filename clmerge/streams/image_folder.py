"""A tree of folders, one a class."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from typing_extensions import override

from clmerge.streams.class_names import readable
from clmerge.streams.files import IMAGE_SUFFIXES, FileImages, read_lines
from clmerge.streams.sources import DataSource, LabelledImages, Templates
from clmerge.streams.splits import stratified_cut

_NUMBER = re.compile(r"^\d+\.")


class ImageFolderSource(DataSource):
    """A tree of folders, one a class: ``ROOT/train/CLASS/*`` and ``ROOT/test/CLASS/*``, or ``ROOT/CLASS/*``.

    Without a train folder the whole tree is cut into train and test by ``seed``. Class ids count the sorted
    folder names; the readable names have spaces for underscores and no leading ``001.`` where every folder
    has one (CUB-200).

    Args:
        root: the tree.
        name: name of the data set, which selects its prompt templates (default: the name of the root folder).
        train_folder: training images, relative to the root.
        test_folder: test images, relative to the root.
        test_fraction: share of each class held out as the test split where there is no train folder.
        seed: seed of that cut.
        class_name_file: text file with lines ``FOLDER NAME`` that names the classes, such as ImageNet-R's
            README.txt (lines whose first word is no folder are left out); class ids then count the sorted
            names. Relative to the root.
        templates: prompt templates, or the name of the data set whose templates to use, "generic" for the
            plain one (default: those of the data set called ``name``).

    Raises:
        ValueError: if ``test_fraction`` is out of range.
        RuntimeError: if the tree is not there or not as described (when it is first needed).
    """

    def __init__(
        self,
        root: str | Path,
        *,
        name: str | None = None,
        train_folder: str = "train",
        test_folder: str = "test",
        test_fraction: float = 0.2,
        seed: int = 0,
        class_name_file: str | None = None,
        templates: Templates = None,
    ) -> None:
        self.root = Path(root).expanduser()
        super().__init__(name or self.root.absolute().name, templates=templates)
        if not 0.0 < test_fraction < 1.0:
            raise ValueError(f"expected test_fraction in (0, 1), got {test_fraction}")
        self.train_folder = train_folder
        self.test_folder = test_folder
        self.test_fraction = test_fraction
        self.seed = seed
        self.class_name_file = class_name_file

    @property
    @override
    def class_names(self) -> list[str]:
        return self._classes[1]

    @cached_property
    def _classes(self) -> tuple[list[str], list[str]]:
        """Class folders by class id, and their readable names."""
        tops = [self.root / self.train_folder, self.root / self.test_folder] if self._is_split else [self.root]
        folders = sorted({folder.name for top in tops for folder in _subfolders(top)})
        if not folders:
            raise RuntimeError(f"expected one folder per class in {tops[0].absolute()}, found none")
        if self.class_name_file is not None:
            named = self._named(folders, self.root / self.class_name_file)
            folders = sorted(folders, key=named.__getitem__)
            return folders, [readable(named[folder]) for folder in folders]
        numbered = all(_NUMBER.match(folder) for folder in folders)
        return folders, [readable(_NUMBER.sub("", folder) if numbered else folder) for folder in folders]

    def _named(self, folders: list[str], path: Path) -> dict[str, str]:
        pairs = [line.split(maxsplit=1) for line in read_lines(path, "lines 'FOLDER NAME'")]
        named = {pair[0]: pair[1] for pair in pairs if len(pair) == 2 and pair[0] in set(folders)}
        missing = [folder for folder in folders if folder not in named]
        if missing:
            raise RuntimeError(f"expected a name for every class folder in {path}, got none for {missing[:5]}")
        return named

    @cached_property
    def _is_split(self) -> bool:
        if not self.root.is_dir():
            raise RuntimeError(
                f"expected a folder tree at {self.root.absolute()} ({self.train_folder}/CLASS/* and "
                f"{self.test_folder}/CLASS/*, or CLASS/*), found no such folder"
            )
        if not (self.root / self.train_folder).is_dir():
            return False
        if not (self.root / self.test_folder).is_dir():
            others = sorted(folder.name for folder in _subfolders(self.root))
            raise RuntimeError(
                f"expected {self.test_folder!r} beside {self.train_folder!r} in {self.root.absolute()}, "
                f"found {others}: name it with test_folder"
            )
        return True

    @cached_property
    def _everything(self) -> FileImages:
        return self._read(self.root)

    def _read(self, top: Path) -> FileImages:
        paths: list[Path] = []
        targets: list[int] = []
        for class_id, folder in enumerate(self._classes[0]):
            found = _images(top / folder)
            paths += found
            targets += [class_id] * len(found)
        if not paths:
            raise RuntimeError(f"expected images in {top.absolute()}/CLASS/, found none ({_suffixes()})")
        return FileImages(paths, targets)

    @override
    def _load(self, split: str) -> LabelledImages:
        if self._is_split:
            return self._read(self.root / (self.train_folder if split == "train" else self.test_folder))
        train, test = stratified_cut(self._everything.targets, self.test_fraction, seed=self.seed)
        return self._everything.select(train if split == "train" else test)


def _subfolders(top: Path) -> Iterable[Path]:
    return (path for path in top.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    # A class may be absent from one split or domain.
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))
