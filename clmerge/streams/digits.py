"""The handwritten digits that are bundled with scikit-learn."""

from __future__ import annotations

from typing_extensions import override

from clmerge.streams.class_names import DIGIT_WORDS
from clmerge.streams.sources import ArrayImages, DataSource, ImageSubset, LabelledImages, Templates
from clmerge.streams.splits import check_test_fraction, stratified_cut


class SklearnDigits(DataSource):
    """Handwritten digits bundled with scikit-learn: 1797 real images of 8 x 8 pixels, no download.

    The images are the test part of the UCI "Optical Recognition of Handwritten Digits" data; grey values
    0..16 are stretched to 0..255.

    Args:
        test_fraction: share of each class that is held out as the test split.
        seed: seed of the cut into train and test.
        templates: prompt templates, or the name of the data set whose templates to use (default: its own).

    Example:
        >>> source = SklearnDigits(test_fraction=0.2)
        >>> len(source.train()), len(source.test())
        (1438, 359)
        >>> source.class_names[:3]
        ['zero', 'one', 'two']
    """

    def __init__(self, test_fraction: float = 0.2, *, seed: int = 0, templates: Templates = None) -> None:
        super().__init__("SklearnDigits", templates=templates)
        check_test_fraction(test_fraction)
        self.test_fraction = test_fraction
        self.seed = seed

    @property
    @override
    def class_names(self) -> list[str]:
        return list(DIGIT_WORDS)

    @override
    def _load(self, split: str) -> LabelledImages:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = (bunch.images * (255.0 / 16.0)).round().astype("uint8")
        targets = [int(target) for target in bunch.target]
        train, test = stratified_cut(targets, self.test_fraction, seed=self.seed)
        return ImageSubset(ArrayImages(images, targets), train if split == "train" else test)
