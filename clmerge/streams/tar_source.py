"""Images in tar archives in the layout of WebDataset, read at their positions."""

from __future__ import annotations

import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from typing_extensions import override

from clmerge.files import parse_json
from clmerge.streams.class_names import readable
from clmerge.streams.decoding import UnreadableImageError
from clmerge.streams.files import IMAGE_SUFFIXES, read_lines
from clmerge.streams.sources import DataSource, EncodedImages, ImageSubset, LabelledImages, Templates
from clmerge.streams.splits import check_test_fraction, stratified_cut

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class TarImages(EncodedImages):
    """Images inside uncompressed tar archives.

    An image is three numbers in memory, 20 bytes; every access opens its archive and reads the image alone, so worker
    processes share nothing.

    Args:
        shards: the archives.
        places: index of the archive, position and size in bytes of every image.
        targets: class id of every image.
    """

    def __init__(self, shards: Sequence[Path], places: Sequence[array[int]], targets: list[int]) -> None:
        self.shards = list(shards)
        self.places = places
        self.targets = targets

    @override
    def encoded(self, index: int) -> bytes:
        shard, position, size = (column[index] for column in self.places)
        try:
            with self.shards[shard].open("rb") as file:
                file.seek(position)
                return file.read(size)
        except OSError as error:
            raise UnreadableImageError(f"expected an image in {self.shards[shard]}, got {error}") from error

    @override
    def where(self, index: int) -> str:
        shard, position, _ = (column[index] for column in self.places)
        return f"the image at byte {position}, {self._name(index)}, of {self.shards[shard]}"

    def _name(self, index: int) -> str:
        """Return the name of an image, which is in the 512 bytes before it."""
        shard, position, _ = (column[index] for column in self.places)
        try:
            with self.shards[shard].open("rb") as file:
                file.seek(position - tarfile.BLOCKSIZE)
                return tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape").name
        except (OSError, tarfile.HeaderError):
            return "whose name cannot be read"


class WebDatasetSource(DataSource):
    """Local tar archives in the layout of WebDataset: files of one name and several endings are one sample.

    A sample is an image (``000017.jpg``) and its label, ``000017.cls`` or a key of ``000017.json``. The archives are
    indexed once; then every image is read at its position, so that tasks, orders and resumed runs are exact, and memory
    does not grow with the size of the images. Archives must not be compressed.

    Args:
        train: archives of the training images: a path, a pattern with ``*``, or a range like ``train-{000..015}.tar``.
        test: archives of the test images (default: they are cut from the training images).
        val: archives of the validation images (default: they are cut from the training images).
        label_key: key of the label in the JSON files of samples without a ``.cls`` file.
        class_name_file: text file with one class name per line, of label 0, 1, ... (default: the labels themselves).
        name: name of the data set, which selects its prompt templates (default: that of the training archives' folder).
        test_fraction: share of each class held out as the test split if there is none.
        seed: seed of that cut.
        templates: prompt templates, or the name of the data set whose templates to use, "generic" for the
            plain one (default: those of the data set called ``name``).

    Raises:
        ValueError: if ``test_fraction`` is out of range.
        RuntimeError: if an archive is missing or not as described (when it is first needed).
    """

    def __init__(
        self,
        train: str,
        *,
        test: str | None = None,
        val: str | None = None,
        label_key: str = "label",
        class_name_file: str | None = None,
        name: str | None = None,
        test_fraction: float = 0.2,
        seed: int = 0,
        templates: Templates = None,
    ) -> None:
        super().__init__(name or Path(train).expanduser().absolute().parent.name, templates=templates)
        check_test_fraction(test_fraction)
        self.patterns = {"train": train, "val": val, "test": test}
        self.label_key = label_key
        self.class_name_file = class_name_file
        self.test_fraction = test_fraction
        self.seed = seed

    @property
    @override
    def class_names(self) -> list[str]:
        return self._class_names

    @cached_property
    def _class_names(self) -> list[str]:
        labels = self._ids
        if self.class_name_file is None:
            return [readable(label) for label in labels]
        path = Path(self.class_name_file).expanduser()
        lines = read_lines(path, "one class name per line")
        unnamed = next((label for label in labels if not label.isdecimal() or int(label) >= len(lines)), None)
        if unnamed is not None:
            raise RuntimeError(
                f"expected labels 0 to {len(lines) - 1}, as {path} has {len(lines)} class names, got {unnamed!r}"
            )
        return [readable(lines[int(label)]) for label in labels]

    @cached_property
    def _index(self) -> dict[str, tuple[list[Path], list[array[int]], list[str]]]:
        """Archives, places and labels of the images of every split."""
        return {
            split: index_shards(shards(pattern), self.label_key)
            for split, pattern in self.patterns.items()
            if pattern is not None
        }

    @cached_property
    def _ids(self) -> dict[str, int]:
        """Class id by label: whole numbers by value, words by the alphabet."""
        labels = {label for _, _, some in self._index.values() for label in some}
        numbers = all(label.isdecimal() for label in labels)
        return {label: class_id for class_id, label in enumerate(sorted(labels, key=int if numbers else None))}

    def _images(self, split: str) -> TarImages:
        archives, places, labels = self._index[split]
        return TarImages(archives, places, [self._ids[label] for label in labels])

    @cached_property
    def _everything(self) -> TarImages:
        return self._images("train")

    @override
    def _load(self, split: str) -> LabelledImages:
        if "test" in self._index:
            return self._images(split)
        train, test = stratified_cut(self._everything.targets, self.test_fraction, seed=self.seed)
        return ImageSubset(self._everything, train if split == "train" else test)

    @override
    def _load_validation(self) -> LabelledImages | None:
        return self._images("val") if "val" in self._index else None


def shards(pattern: str) -> list[Path]:
    """Return the archives that a pattern with ``*`` or a range like ``{000..015}`` names, in order.

    Raises:
        RuntimeError: if there are none, or one of a range is missing.
    """
    found: list[Path] = []
    for name in _spelled_out(pattern):
        path = Path(name).expanduser().absolute()
        matches = sorted(path.parent.glob(path.name))
        if not matches:
            raise RuntimeError(f"expected tar archives at {path}, found none")
        found += matches
    return found


def _spelled_out(pattern: str) -> list[str]:
    """Write the ranges of a pattern out.

    Example:
        >>> _spelled_out("a-{08..10}.tar")
        ['a-08.tar', 'a-09.tar', 'a-10.tar']
    """
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    head, tail = pattern[: found.start()], _spelled_out(pattern[found.end() :])
    return [f"{head}{number:0{len(first)}d}{rest}" for number in range(int(first), int(last) + 1) for rest in tail]


def index_shards(archives: Sequence[Path], label_key: str) -> tuple[list[Path], list[array[int]], list[str]]:
    """Find the images and labels in archives; images are not read.

    Args:
        archives: the archives.
        label_key: key of the label in JSON files.

    Returns:
        The archives; index of the archive, position and size of every image; and the label of every image.

    Raises:
        RuntimeError: if an archive is compressed or damaged, or a sample has no label, or not one image.
    """
    places = [array("i"), array("q"), array("q")]
    labels: list[str] = []
    known: dict[str, str] = {}  # one text for all images of a label
    for number, path in enumerate(archives):
        for position, size, label in _samples(path, label_key):
            for column, value in zip(places, (number, position, size), strict=True):
                column.append(value)
            labels.append(known.setdefault(label, label))
    if not labels:
        raise RuntimeError(f"expected samples NAME.jpg and NAME.cls in {archives[0].absolute()}, found no image")
    return list(archives), places, labels


def _samples(path: Path, label_key: str) -> Iterator[tuple[int, int, str]]:
    """Yield position, size and label of the images of an archive."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                stem, dot, ending = name.name.partition(".")
                if not member.isreg() or not stem:  # folders, and hidden files, which macOS adds
                    continue
                key, suffix = str(name.parent / stem), f".{ending.lower()}" if dot else ""
                if suffix in IMAGE_SUFFIXES:
                    if key in images or member.issparse():
                        raise RuntimeError(f"expected one plain image of sample {key!r} in {path}, got another")
                    images[key] = (member.offset_data, member.size)
                elif suffix == ".cls" or (suffix == ".json" and key not in labels):
                    content = archive.extractfile(member)
                    assert content is not None  # it is a regular file
                    text = _label(content.read(), suffix, label_key, f"{member.name} in {path}")
                    if text is not None:
                        labels[key] = text
    except (tarfile.TarError, OSError, EOFError) as error:
        raise RuntimeError(
            f"expected an uncompressed tar archive at {path.absolute()}, got {error}; images can be read at their "
            "positions only where an archive is not compressed"
        ) from error
    for key, (position, size) in images.items():
        if key not in labels:
            raise RuntimeError(
                f"expected a label of sample {key!r} in {path}, found neither {key}.cls nor {label_key!r} in {key}.json"
            )
        yield position, size, labels[key]


def _label(content: bytes, suffix: str, label_key: str, where: str) -> str | None:
    """Return the label in a file of a sample; None if its JSON has no such key."""
    try:
        found = content.decode().strip() if suffix == ".cls" else parse_json(content, "other text").get(label_key)
    except (ValueError, AttributeError) as error:
        raise RuntimeError(f"expected a label in {where}, got {error}") from error
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | str) or not (text := str(found).strip()):
        raise RuntimeError(f"expected a word or a whole number as label in {where}, got {found!r}")
    return text
