import numpy as np
import pytest
from streams.tiny_layouts import pixels

from clmerge.streams.sources import ArrayImages, DataSource, ImageSubset


class Shapes(DataSource):
    def __init__(self, targets, *, name="Food101", templates=None):
        super().__init__(name, templates=templates)
        self.loaded = []
        self._targets = targets

    @property
    def class_names(self):
        return ["square", "circle"]

    def _load(self, split):
        self.loaded.append(split)
        return ArrayImages(pixels(len(self._targets)), self._targets)


def test_grey_and_colour_arrays_become_rgb():
    grey, colour = ArrayImages(pixels(2), [0, 1]), ArrayImages(pixels(2, channels=3), [0, 1])
    for images in (grey, colour):
        image, target = images[1]
        assert (image.mode, image.size, target) == ("RGB", (8, 8), 1)
    np.testing.assert_array_equal(np.asarray(grey[0][0])[..., 1], grey.images[0])
    np.testing.assert_array_equal(np.asarray(colour[0][0]), colour.images[0])


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        (np.zeros((2, 8, 8)), [0, 1], "expected uint8"),
        (np.zeros((2, 8, 8, 4), np.uint8), [0, 1], "expected uint8"),
        (np.zeros((2, 8, 8), np.uint8), [0], "2 images and 1 labels"),
    ],
)
def test_arrays_of_the_wrong_form(images, targets, message):
    with pytest.raises(ValueError, match=message):
        ArrayImages(images, targets)


def test_subset_maps_images_and_labels():
    whole = ArrayImages(pixels(4), [0, 1, 2, 3])
    subset = ImageSubset(whole, [3, 1])
    assert subset.targets == [3, 1]
    assert len(subset) == 2
    np.testing.assert_array_equal(np.asarray(subset[0][0]), np.asarray(whole[3][0]))


def test_splits_are_loaded_once_and_late():
    source = Shapes([0, 1])
    assert source.loaded == []
    assert source.train() is source.train()
    assert source.test() is source.test()
    assert source.val() is None
    assert source.loaded == ["train", "test"]


def test_label_without_a_name():
    with pytest.raises(ValueError, match=r"labels in 0\.\.1 .* got 2 for image 1 in the train split of Food101"):
        Shapes([0, 2]).train()


def test_templates_by_name_by_alias_and_by_hand():
    assert Shapes([0]).templates == ("a photo of {}, a type of food.",)
    assert Shapes([0], templates="generic").templates == ("a photo of a {}.",)
    assert Shapes([0], templates=["one {}", "two {}"]).templates == ("one {}", "two {}")


def test_without_templates_of_its_own_a_data_set_has_the_plain_one():
    source = Shapes([0], name="my_flowers")
    assert source.templates == ("a photo of a {}.",)
    assert source.has_plain_templates
    assert not Shapes([0], name="my_flowers", templates="generic").has_plain_templates
    assert not Shapes([0]).has_plain_templates


def test_a_misspelt_data_set_of_templates_is_no_error_until_asked_for():
    source = Shapes([0], name="my_flowers", templates="Flowers101")
    with pytest.raises(ValueError, match="Flowers102"):
        _ = source.templates


def test_template_without_a_place_for_the_name():
    with pytest.raises(ValueError, match=r"one \{\} for the class name, got 'a photo'"):
        _ = Shapes([0], templates=["a photo"]).templates
