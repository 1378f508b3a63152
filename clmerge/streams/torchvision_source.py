"""torchvision's classification data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from typing_extensions import override

from clmerge.streams import class_names as names
from clmerge.streams.decoding import as_rgb
from clmerge.streams.sources import DataSource, ImageSubset, LabelledImages, Templates
from clmerge.streams.splits import check_test_fraction, stratified_cut

if TYPE_CHECKING:
    from PIL.Image import Image

TorchvisionName: TypeAlias = Literal[
    "CIFAR10",
    "CIFAR100",
    "DTD",
    "EMNIST",
    "EuroSAT",
    "FER2013",
    "FashionMNIST",
    "Flowers102",
    "Food101",
    "GTSRB",
    "KMNIST",
    "MNIST",
    "OxfordIIITPet",
    "PCAM",
    "RenderedSST2",
    "STL10",
    "SUN397",
    "SVHN",
    "StanfordCars",
]
EmnistSplit: TypeAlias = Literal["balanced", "byclass", "bymerge", "digits", "letters", "mnist"]
Kwargs: TypeAlias = dict[str, Any]


def _own_names(dataset: Any) -> list[str]:
    return [names.readable(name) for name in dataset.classes]


def _fixed(wanted: tuple[str, ...]) -> Callable[[Any], list[str]]:
    return lambda dataset: list(wanted)


def _attribute(name: str) -> Callable[[Any], list[int]]:
    return lambda dataset: [int(target) for target in getattr(dataset, name)]


def _sample_labels(dataset: Any) -> list[int]:
    return [int(sample[1]) for sample in dataset._samples]


def _pcam_labels(dataset: Any) -> list[int]:
    # torchvision opens the file again for every label.
    targets_file = dataset._FILES[dataset._split]["targets"][0]
    with dataset.h5py.File(dataset._base_folder / targets_file) as targets:
        return [int(target) for target in targets["y"][:, 0, 0, 0]]


@dataclass(frozen=True)
class _Recipe:
    """How one torchvision class is opened.

    The labels are read from private attributes if the class has no public ones, because the public API decodes every
    image.
    """

    layout: str
    labels: Callable[[Any], list[int]]
    class_names: Callable[[Any], list[str]] = _own_names
    train: Kwargs = field(default_factory=lambda: {"split": "train"})
    test: Kwargs | None = field(default_factory=lambda: {"split": "test"})
    val: Kwargs | None = None
    downloads: bool = True


def _idx(folder: str) -> str:
    return f"{folder}/raw/train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-..."


_BY_FLAG: Kwargs = {"train": {"train": True}, "test": {"train": False}}
_TARGETS, _LABELS, _PRIVATE = _attribute("targets"), _attribute("labels"), _attribute("_labels")
_RECIPES: dict[str, _Recipe] = {
    "CIFAR10": _Recipe("cifar-10-batches-py/data_batch_1 ... test_batch, batches.meta", _TARGETS, **_BY_FLAG),
    "CIFAR100": _Recipe("cifar-100-python/train, test, meta", _TARGETS, **_BY_FLAG),
    "DTD": _Recipe("dtd/dtd/images/CLASS/*.jpg and dtd/dtd/labels/*.txt", _PRIVATE, val={"split": "val"}),
    "EMNIST": _Recipe("EMNIST/raw/emnist-SPLIT-train-images-idx3-ubyte, ...", _TARGETS, **_BY_FLAG),
    "EuroSAT": _Recipe(
        "eurosat/2750/CLASS/*.jpg",
        _TARGETS,
        lambda dataset: [names.EUROSAT.get(name, names.readable(name)) for name in dataset.classes],
        train={},
        test=None,
    ),
    "FER2013": _Recipe(
        "fer2013/fer2013.csv (from Kaggle)",
        _sample_labels,
        _fixed(tuple(synonyms[0] for synonyms in names.FER2013)),
        downloads=False,
    ),
    "FashionMNIST": _Recipe(_idx("FashionMNIST"), _TARGETS, lambda dataset: list(dataset.classes), **_BY_FLAG),
    "Flowers102": _Recipe(
        "flowers-102/jpg/*.jpg, imagelabels.mat, setid.mat",
        _PRIVATE,
        _fixed(names.FLOWERS102),
        val={"split": "val"},
    ),
    "Food101": _Recipe("food-101/images/CLASS/*.jpg and food-101/meta/*.json", _PRIVATE),
    "GTSRB": _Recipe(
        "gtsrb/GTSRB/Training/00000/*.ppm, gtsrb/GTSRB/Final_Test/Images/*.ppm, gtsrb/GT-final_test.csv",
        _sample_labels,
        _fixed(names.GTSRB),
    ),
    "KMNIST": _Recipe(_idx("KMNIST"), _TARGETS, **_BY_FLAG),
    "MNIST": _Recipe(_idx("MNIST"), _TARGETS, _fixed(names.DIGITS), **_BY_FLAG),
    "OxfordIIITPet": _Recipe(
        "oxford-iiit-pet/images/*.jpg and oxford-iiit-pet/annotations/{trainval,test}.txt",
        _PRIVATE,
        train={"split": "trainval"},
    ),
    "PCAM": _Recipe("pcam/camelyonpatch_level_2_split_*.h5", _pcam_labels, _fixed(names.PCAM), val={"split": "val"}),
    "RenderedSST2": _Recipe("rendered-sst2/{train,valid,test}/CLASS/*.png", _sample_labels, val={"split": "val"}),
    "STL10": _Recipe("stl10_binary/train_X.bin, train_y.bin, test_X.bin, ...", _LABELS, _fixed(names.STL10)),
    "SUN397": _Recipe("SUN397/ClassName.txt and SUN397/a/CLASS/sun_*.jpg", _PRIVATE, train={}, test=None),
    "SVHN": _Recipe("train_32x32.mat, test_32x32.mat", _LABELS, _fixed(names.DIGITS)),
    "StanfordCars": _Recipe(
        "stanford_cars/{cars_train,cars_test}/*.jpg, stanford_cars/devkit/*.mat, "
        "stanford_cars/cars_test_annos_withlabels.mat",
        _sample_labels,
        downloads=False,
    ),
}


class TorchvisionImages(LabelledImages):
    """Images served by a torchvision data set.

    Args:
        dataset: items ``(PIL image, label)``.
        targets: class id of every item.
    """

    def __init__(self, dataset: Any, targets: list[int]) -> None:
        self.dataset = dataset
        self.targets = targets

    @override
    def image(self, index: int) -> Image:
        image: Image = self.dataset[index][0]
        return as_rgb(image)

    @override
    def where(self, index: int) -> str:
        return f"image {index} of torchvision's {type(self.dataset).__name__}"


class TorchvisionSource(DataSource):
    """A torchvision data set by name; downloads only if ``download`` is set.

    EuroSAT and SUN397 have no official split in torchvision and are cut by ``seed``. DTD, Flowers102, PCAM and
    RenderedSST2 use their own validation split. EMNIST's images are transposed, as torchvision serves them.

    Args:
        dataset: name of the torchvision class.
        root: folder that holds the data in torchvision's layout.
        download: let torchvision download missing data.
        emnist_split: which of EMNIST's six sets to use; "digits" is the one of the 20-task merging suite. Its
            prompts are about digits: give ``templates`` for letters.
        test_fraction: share of each class held out as the test split, for EuroSAT and SUN397.
        seed: seed of that cut.
        templates: prompt templates, or the name of the data set whose templates to use (default: the data
            set's own).

    Raises:
        ValueError: if the data set's name is not known.
        RuntimeError: if the files are missing (when they are first needed).
    """

    def __init__(
        self,
        dataset: TorchvisionName,
        *,
        root: str | Path,
        download: bool = False,
        emnist_split: EmnistSplit = "digits",
        test_fraction: float = 0.2,
        seed: int = 0,
        templates: Templates = None,
    ) -> None:
        super().__init__(dataset, templates=templates)
        if dataset not in _RECIPES:
            raise ValueError(f"expected dataset to be one of {list(get_args(TorchvisionName))}, got {dataset!r}")
        check_test_fraction(test_fraction)
        self.root = Path(root).expanduser()
        self.download = download
        self.emnist_split = emnist_split
        self.test_fraction = test_fraction
        self.seed = seed

    @property
    def _recipe(self) -> _Recipe:
        return _RECIPES[self.name]

    @property
    def _letters(self) -> bool:
        return self.name == "EMNIST" and self.emnist_split == "letters"

    @property
    @override
    def class_names(self) -> list[str]:
        return self._class_names

    @cached_property
    def _class_names(self) -> list[str]:
        class_names = self._recipe.class_names(self._opened)
        # EMNIST's letters are labelled 1 to 26; torchvision has an unused class "N/A" for 0.
        return class_names[1:] if self._letters else class_names

    @property
    @override
    def prompt_names(self) -> list[tuple[str, ...]]:
        return list(names.FER2013) if self.name == "FER2013" else super().prompt_names

    @override
    def _load(self, split: str) -> LabelledImages:
        recipe = self._recipe
        if recipe.test is None:
            everything = self._images(self._opened)
            train, test = stratified_cut(everything.targets, self.test_fraction, seed=self.seed)
            return ImageSubset(everything, train if split == "train" else test)
        return self._images(self._opened if split == "train" else self._open(recipe.test))

    @override
    def _load_validation(self) -> LabelledImages | None:
        return None if self._recipe.val is None else self._images(self._open(self._recipe.val))

    @cached_property
    def _opened(self) -> Any:
        return self._open(self._recipe.train)

    def _images(self, dataset: Any) -> TorchvisionImages:
        targets = self._recipe.labels(dataset)
        return TorchvisionImages(dataset, [target - 1 for target in targets] if self._letters else targets)

    def _open(self, kwargs: Kwargs) -> Any:
        from torchvision import datasets

        if self.name == "EMNIST":
            kwargs = {**kwargs, "split": self.emnist_split}
        if self._recipe.downloads:
            kwargs = {**kwargs, "download": self.download}
        try:
            return getattr(datasets, self.name)(root=str(self.root), **kwargs)
        except (RuntimeError, FileNotFoundError) as error:
            if self.download and self._recipe.downloads:
                raise
            way = (
                "Put them there, or set download=True."
                if self._recipe.downloads
                else "Put them there; torchvision cannot download this data set."
            )
            raise RuntimeError(
                f"expected the files of {self.name} in {self.root.absolute()} as {self._recipe.layout}. "
                f"{way} (torchvision: {error})"
            ) from error
