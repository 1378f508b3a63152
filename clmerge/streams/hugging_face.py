"""Data sets in the format of Hugging Face's ``datasets``: saved folders, Parquet and image folders, or of the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from clmerge.streams.class_names import readable
from clmerge.streams.decoding import UnreadableImageError
from clmerge.streams.sources import DataSource, EncodedImages, ImageSubset, LabelledImages, Templates
from clmerge.streams.split_folders import Role, role_of
from clmerge.streams.splits import check_test_fraction, stratified_cut

if TYPE_CHECKING:
    from datasets import Dataset

_ROLES: tuple[Role, ...] = ("train", "val", "test")
_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves
_FIRST_WITHOUT_SCRIPTS = 4
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}


class HuggingFaceImages(EncodedImages):
    """Images of one split, read from memory-mapped files on access.

    Args:
        split: one column of images, as bytes or paths that are not decoded.
        targets: class id of every image.
        origin: the split in messages.
    """

    def __init__(self, split: Dataset, targets: list[int], origin: str) -> None:
        self.split = split
        self.targets = targets
        self.origin = origin

    @override
    def encoded(self, index: int) -> bytes:
        (cell,) = self.split[index].values()
        if cell is None:
            raise UnreadableImageError(f"expected an image in {self.where(index)}, got an empty cell")
        if cell["bytes"] is not None:
            data: bytes = cell["bytes"]
            return data
        try:
            return Path(cell["path"]).read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"expected an image in {self.where(index)}, got {error}") from error

    @override
    def where(self, index: int) -> str:
        return f"row {index} of {self.origin}"


class HuggingFaceSource(DataSource):
    """A data set of Hugging Face's ``datasets`` (``pip install 'clmerge[datasets]'``).

    That is a folder written by ``save_to_disk``, a folder of Parquet files or of images in one of the layouts that
    ``load_dataset`` knows, one ``.parquet`` or ``.arrow`` file, or, with ``download``, a name on the Hub. Class names
    are those of the label's ``ClassLabel``; of other labels, the values in order. No code of a data set is run.

    Args:
        dataset: the folder, the file, or the name on the Hub.
        download: let ``dataset`` be a name on the Hub, from where it is downloaded unless it is in the local cache.
        subset: which of the data set's configurations to load (default: its only one).
        train_split: split of the training images (default: the one with a usual name).
        test_split: split of the test images (default: the one with a usual name; of a single split they are cut).
        val_split: split of the validation images (default: the one with a usual name).
        image_column: column of the images (default: the only one that holds images).
        label_column: column of the labels (default: the only ``ClassLabel``, or ``label``).
        name: name of the data set, which selects its prompt templates (default: the last part of ``dataset``).
        test_fraction: share of each class held out as the test split if there is a single split.
        seed: seed of that cut.
        templates: prompt templates, or the name of the data set whose templates to use, "generic" for the
            plain one (default: those of the data set called ``name``).

    Raises:
        ValueError: if ``test_fraction`` is out of range.
        RuntimeError: if the data set, a split or a column is missing or not as described (when it is first needed), or
            the package ``datasets`` is.
    """

    def __init__(
        self,
        dataset: str,
        *,
        download: bool = False,
        subset: str | None = None,
        train_split: str | None = None,
        test_split: str | None = None,
        val_split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        name: str | None = None,
        test_fraction: float = 0.2,
        seed: int = 0,
        templates: Templates = None,
    ) -> None:
        super().__init__(name or Path(dataset).name, templates=templates)
        check_test_fraction(test_fraction)
        self.dataset = dataset
        self.download = download
        self.subset = subset
        self.given: dict[Role, str | None] = {"train": train_split, "val": val_split, "test": test_split}
        self.image_column = image_column
        self.label_column = label_column
        self.test_fraction = test_fraction
        self.seed = seed

    @property
    @override
    def class_names(self) -> list[str]:
        return [readable(name) for name in self._labels.values()]

    @cached_property
    def _splits(self) -> dict[Role, Dataset]:
        """The splits that are used; a single one is called "train"."""
        found = _load(self.dataset, self.subset, download=self.download)
        if len(found) == 1 and not any(self.given.values()):
            return {"train": next(iter(found.values()))}
        chosen = {role: name for role in _ROLES if (name := self._name_of(role, list(found))) is not None}
        if chosen.get("train") in (chosen.get("test"), None):
            raise RuntimeError(
                f"expected a training and a test split of {self.dataset}, found {list(found)}: name two different ones "
                "with train_split and test_split"
            )
        if "test" not in chosen:
            raise RuntimeError(
                f"expected a test split of {self.dataset}, found {list(found)}: name the one to test on with test_split"
            )
        if chosen.get("val") in (chosen["train"], chosen["test"]):
            del chosen["val"]
        return {role: found[name] for role, name in chosen.items()}

    def _name_of(self, role: Role, names: list[str]) -> str | None:
        if (given := self.given[role]) is not None:
            if given not in names:
                raise RuntimeError(f"expected a split {given!r} of {self.dataset}, as {role}_split says, found {names}")
            return given
        usual = [name for name in names if role_of(name) == role]
        if len(usual) > 1:
            raise RuntimeError(f"expected one {role} split of {self.dataset}, found {usual}: name it with {role}_split")
        return usual[0] if usual else None

    @cached_property
    def _columns(self) -> tuple[str, str]:
        """The columns of images and labels."""
        features: Mapping[str, Any] = self._splits["train"].features
        images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
        labels = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
        labels = labels or [name for name in ("label", "labels") if name in features][:1]
        return (
            _column("image_column", self.image_column, images, features, self.dataset),
            _column("label_column", self.label_column, labels, features, self.dataset),
        )

    @cached_property
    def _values(self) -> dict[Role, list[Any]]:
        """The label of every image of every split."""
        return {role: self._splits[role][self._columns[1]][:] for role in self._splits}

    @cached_property
    def _labels(self) -> dict[Any, str]:
        """Class names by label, in the order of class ids."""
        feature = self._splits["train"].features[self._columns[1]]
        if type(feature).__name__ == "ClassLabel":
            return dict(enumerate(feature.names))
        for role, values in self._values.items():
            wrong = next((row for row, value in enumerate(values) if not isinstance(value, str | int)), None)
            if wrong is not None:
                raise RuntimeError(
                    f"expected words or whole numbers as labels in {self._columns[1]!r}, got {values[wrong]!r} in row "
                    f"{wrong} of {self._origin(role)}"
                )
        return {value: str(value) for value in sorted({value for some in self._values.values() for value in some})}

    def _origin(self, role: Role) -> str:
        return f"the {role} split of {self.dataset}"

    def _images(self, role: Role) -> HuggingFaceImages:
        from datasets import Image

        image_column, label_column = self._columns
        ids = {label: class_id for class_id, label in enumerate(self._labels)}
        values = self._values[role]
        unknown = next((row for row, value in enumerate(values) if value not in ids), None)
        if unknown is not None:
            raise RuntimeError(
                f"expected one of {len(ids)} classes in {label_column!r}, got {values[unknown]!r} in row {unknown} of "
                f"{self._origin(role)}: splits without labels cannot be used"
            )
        column = self._splits[role].select_columns([image_column])
        try:
            column = column.cast_column(image_column, Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise RuntimeError(
                f"expected images in column {image_column!r} of {self.dataset}, got {column.features[image_column]}"
            ) from error
        return HuggingFaceImages(column, [ids[value] for value in values], self._origin(role))

    @cached_property
    def _everything(self) -> HuggingFaceImages:
        return self._images("train")

    @override
    def _load(self, split: str) -> LabelledImages:
        role: Role = "train" if split == "train" else "test"
        if "test" in self._splits:
            return self._images(role)
        train, test = stratified_cut(self._everything.targets, self.test_fraction, seed=self.seed)
        return ImageSubset(self._everything, train if role == "train" else test)

    @override
    def _load_validation(self) -> LabelledImages | None:
        return self._images("val") if "val" in self._splits else None


def _column(option: str, given: str | None, found: Sequence[str], features: Mapping[str, Any], dataset: str) -> str:
    if given is None and len(found) == 1:
        return found[0]
    if given in features:
        return str(given)
    what = f"a column {given!r}" if given else f"one column of {option.removesuffix('_column')}s"
    columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    raise RuntimeError(f"expected {what} in {dataset}, found {columns}: name the one to use with {option}")


def _load(dataset: str, subset: str | None, *, download: bool) -> dict[str, Dataset]:
    """Return the splits of a data set by name."""
    path = Path(dataset).expanduser()
    if not path.exists() and not download:
        raise RuntimeError(
            f"expected a folder or file of a data set at {path.absolute()}, found none; if it is a name on Hugging "
            "Face's Hub, set download=true"
        )
    try:
        import datasets
    except ImportError as error:
        raise RuntimeError(
            f"expected the package datasets to read {dataset}, which is not installed: pip install 'clmerge[datasets]'"
        ) from error
    if int(datasets.__version__.partition(".")[0]) < _FIRST_WITHOUT_SCRIPTS:
        raise RuntimeError(
            f"expected version {_FIRST_WITHOUT_SCRIPTS} or newer of the package datasets, which runs no code of a data "
            f"set, got {datasets.__version__}: pip install -U 'clmerge[datasets]'"
        )
    try:
        if any((path / name).is_file() for name in _SAVED):
            found = datasets.load_from_disk(str(path))
        elif path.is_file():
            builder = _BUILDERS.get(path.suffix.lower())
            if builder is None:
                raise ValueError(f"a {path.suffix or 'nameless'} file; {' and '.join(_BUILDERS)} files can be read")
            found = datasets.load_dataset(builder, data_files=str(path))
        else:
            found = datasets.load_dataset(str(path) if path.exists() else dataset, subset)
    except Exception as error:  # of many kinds, some of them private to the package
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RuntimeError(f"expected a data set of Hugging Face's datasets in {dataset}, got {reason}") from error
    return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
