"""Find the folders of the splits in a tree, by their usual names in any case."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from clmerge.streams.files import IMAGE_SUFFIXES

Role: TypeAlias = Literal["train", "val", "test"]

_NAMES: dict[Role, tuple[str, ...]] = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tst"),
}
# Folders that archive tools and file systems create.
_NOT_DATA = ("__MACOSX", "@eaDir", "lost+found")


@dataclass(frozen=True)
class SplitFolders:
    """The folders of the splits of one tree.

    Attributes:
        train: folder of the training images, with one folder per class.
        test: folder of the test images; None if they must be cut from the training images.
        val: folder of the validation images; None if they must be cut from the training images.
    """

    train: Path
    test: Path | None = None
    val: Path | None = None

    @property
    def tops(self) -> list[Path]:
        """The folders whose subfolders are classes."""
        return [top for top in (self.train, self.test, self.val) if top is not None]


def split_folders(root: Path, *, train: str | None, test: str | None, val: str | None) -> SplitFolders:
    """Find the splits of a tree.

    Args:
        root: the tree.
        train: the training folder relative to the root; None to look for one of the usual names.
        test: the test folder; None to look for it.
        val: the validation folder; None to look for it if another split is looked for.

    Raises:
        RuntimeError: if a folder is missing, or several folders could be a split.
    """
    if not root.is_dir():
        raise RuntimeError(
            f"expected a folder tree at {root.absolute()} (train/CLASS/* and test/CLASS/*, or CLASS/*), "
            f"found no such folder{_nearest(root)}"
        )
    asked: dict[Role, str | None] = {"train": train, "test": test, "val": val}
    given = {role: _folder(root, role, name) for role, name in asked.items() if name is not None}
    if "train" in given and given["train"] == given.get("test"):
        return SplitFolders(given["train"], None, given.get("val"))
    if "train" in given and "test" in given:
        return SplitFolders(given["train"], given["test"], given.get("val"))
    found = usual_splits(root)
    chosen = {role: given.get(role) or _one(root, role, found[role], set(given.values())) for role in asked}
    if chosen["train"] is not None and chosen["test"] is not None:
        return SplitFolders(chosen["train"], chosen["test"], chosen["val"])
    if any(chosen.values()):
        absent: Role = "train" if chosen["train"] is None else "test"
        present = next(path.name for path in chosen.values() if path is not None)
        again = f" ({present!r} again to cut test images from it)" if absent == "test" else ""
        raise RuntimeError(
            f"expected {absent!r} beside {present!r} in {root.absolute()}, with one folder per class, found "
            f"{_names(root)}: name it with {absent}_folder{again}; {_all_are_classes()}"
        )
    return _without_splits(root)


def _nearest(root: Path) -> str:
    """Return the folder beside a missing one that is named most like it, as the end of a message."""
    names = [folder.name for folder in subfolders(root.parent)] if root.parent.is_dir() else []
    near = difflib.get_close_matches(root.name, names, n=1)
    return f"; the nearest there is {root.parent / near[0]}" if near else ""


def _folder(root: Path, role: str, name: str) -> Path:
    path = root / name
    if not path.is_dir():
        raise RuntimeError(
            f"expected a folder {name!r} in {root.absolute()}, as {role}_folder says, found {_names(root)}"
        )
    return path


def _one(root: Path, role: Role, found: list[Path], taken: set[Path]) -> Path | None:
    free = [path for path in found if path not in taken]
    if len(free) > 1:
        raise RuntimeError(
            f"expected one folder of {role} images in {root.absolute()}, found {[path.name for path in free]}: "
            f"name it with {role}_folder"
        )
    return free[0] if free else None


def _without_splits(root: Path) -> SplitFolders:
    """Treat the folders as classes, unless they look like splits or domains."""
    folders = list(subfolders(root))
    above = [folder for folder in folders if holds_folders(folder)]
    if len(folders) == 1 and above and not _holds_images(folders[0]):
        found = usual_splits(folders[0])
        if found["train"] or found["test"]:  # an archive was unpacked into a subfolder of its own name
            return split_folders(folders[0], train=None, test=None, val=None)
        raise RuntimeError(
            f"expected one folder per class in {root.absolute()}, found {folders[0].name!r} alone, which holds folders "
            f"itself: set root to {folders[0]}; {_all_are_classes()}"
        )
    trees = [folder.name for folder in above if all(usual_splits(folder)[role] for role in ("train", "test"))]
    if trees:
        raise RuntimeError(
            f"expected one folder per class in {root.absolute()}, found train and test folders in {trees[:5]}: set "
            f"root to one of them, or take each for a domain with DomainFolders; {_all_are_classes()}"
        )
    flat = {role: [f.name for f in folders if f.name.casefold() in names] for role, names in _NAMES.items()}
    if flat["train"] and (flat["test"] or flat["val"]):
        raise RuntimeError(
            f"expected one folder per class in {flat['train'][0]!r} of {root.absolute()}, as its name is that of a "
            f"split, found images beside {[*flat['val'], *flat['test']]}: sort them into class folders; "
            f"{_all_are_classes()}"
        )
    suspects = {role: [f.name for f in above if _speaks_of(f.name, role)] for role in _NAMES}
    if suspects["train"] and (suspects["test"] or suspects["val"]):
        raise RuntimeError(
            f"expected one folder per class in {root.absolute()}, found what looks like splits: {suspects['train']} "
            f"and {[*suspects['val'], *suspects['test']]}: name them with train_folder and test_folder; "
            f"{_all_are_classes()}"
        )
    return SplitFolders(root)


def usual_names() -> list[str]:
    """Return the usual names of splits."""
    return [name for names in _NAMES.values() for name in names]


def role_of(name: str) -> Role | None:
    """Return the split that a name denotes, in any case; None if it is not one of the usual names.

    Example:
        >>> role_of("Validation"), role_of("photos")
        ('val', None)
    """
    return next((role for role, names in _NAMES.items() if name.casefold() in names), None)


def usual_splits(root: Path) -> dict[Role, list[Path]]:
    """Return the subfolders that hold folders themselves and have one of the usual names of a split, by split."""
    found: dict[Role, list[Path]] = {"train": [], "val": [], "test": []}
    for folder in subfolders(root):
        role = role_of(folder.name)
        if role is not None and holds_folders(folder):
            found[role].append(folder)
    return found


def _speaks_of(name: str, role: Role) -> bool:
    return any(word in _NAMES[role] for word in re.split(r"[\W\d_]+", name.casefold()))


def subfolders(top: Path) -> Iterator[Path]:
    """Yield the subfolders in order, without hidden ones and those that archive tools create."""
    for path in sorted(top.iterdir()):
        if not path.name.startswith(".") and path.name not in _NOT_DATA and path.is_dir():
            yield path


def holds_folders(folder: Path) -> bool:
    """Return whether a folder has subfolders."""
    return next(subfolders(folder), None) is not None


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def _holds_images(folder: Path) -> bool:
    return any(_is_image(path.name) and path.is_file() for path in folder.iterdir())


def image_files(folder: Path) -> list[Path]:
    """Return the images in a folder and below, in order; hidden files and folders are left out.

    macOS writes a hidden file ``._NAME``, not an image, beside every image that it copies to other file systems.
    """
    found: list[Path] = []
    for top, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _NOT_DATA]
        found += [Path(top, name) for name in files if _is_image(name)]
    return sorted(found)


def _names(root: Path) -> list[str]:
    return [folder.name for folder in subfolders(root)]


def _all_are_classes() -> str:
    return "if all folders are classes, set train_folder and test_folder to '.'"
