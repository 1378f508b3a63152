"""Corruptions against numbers computed by hand, and against another implementation of ImageNet-C."""

import colorsys
import io

import numpy as np
import PIL.Image
import pytest

from clmerge.streams.transforms import Corruption
from clmerge.streams.transforms.corruptions import KINDS, corrupted


def picture(seed=0, size=(24, 20)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[0, 0] = 0  # black has no hue
    return PIL.Image.fromarray(pixels)


def grey(value, size=(100, 100)):
    return PIL.Image.new("RGB", size, (value,) * 3)


@pytest.mark.parametrize(("severity", "deviation"), [*enumerate((0.08, 0.12, 0.18, 0.26, 0.38), 1)])
def test_gaussian_noise_has_its_deviation(severity, deviation):
    """The share within one deviation, which clipping at the ends of the range does not change."""
    found = np.asarray(Corruption("gaussian_noise", severity)(grey(128), 0)) / 255.0
    inside = np.abs(found - 128 / 255) < deviation
    assert inside.mean() == pytest.approx(0.6827, abs=0.02)


def test_shot_noise_counts_photons():
    """At 12 photons for white, grey 0.25 has a Poisson count of mean 3."""
    found = np.asarray(Corruption("shot_noise", 3)(grey(64), 0)) / 255.0 * 12
    counts = np.rint(found)
    assert np.abs(found - counts).max() < 12 / 255 + 1e-9
    assert counts.mean() == pytest.approx(64 / 255 * 12, abs=0.05)
    assert counts.var() == pytest.approx(64 / 255 * 12, abs=0.1)


def test_contrast_shrinks_towards_the_mean_of_each_channel():
    image = PIL.Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (200, 0, 10))
    image.putpixel((1, 0), (100, 0, 30))
    found = np.asarray(Corruption("contrast", 2)(image, 0))  # a share of 0.3 stays
    assert np.abs(found - np.array([[[165, 0, 17], [135, 0, 23]]], dtype=float)).max() <= 1


@pytest.mark.parametrize("severity", [1, 5])
def test_brightness_adds_to_the_value_of_hsv(severity):
    image = picture(1, (6, 5))
    found = np.asarray(Corruption("brightness", severity)(image, 0))
    for (row, column), _ in np.ndenumerate(found[:, :, 0]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(np.asarray(image)[row, column] / 255.0))
        expected = np.array(colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + severity / 10))) * 255
        assert np.abs(found[row, column] - expected).max() <= 1


def test_pixelate_averages_blocks():
    image = picture(2, (10, 10))
    found = np.asarray(corrupted(image, "pixelate", 4, np.random.default_rng()))  # 10 * 0.3 = 3 blocks a side
    assert len(np.unique(found.reshape(-1, 3), axis=0)) <= 9
    one = np.asarray(corrupted(picture(2, (4, 4)), "pixelate", 3, np.random.default_rng()))  # 4 * 0.4 = 1 block
    expected = np.asarray(picture(2, (4, 4))).reshape(-1, 3).mean(axis=0)
    assert np.abs(one - expected).max() <= 0.5


def test_jpeg_is_that_of_its_quality():
    image = picture(3)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=10)
    expected = np.asarray(PIL.Image.open(buffer))
    assert np.array_equal(np.asarray(Corruption("jpeg", 4)(image, 0)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_always_corrupted_in_the_same_way(kind):
    image = picture(4)
    before = np.asarray(image).copy()
    one, again = (np.asarray(Corruption(kind, 3)(image, 5)) for _ in range(2))
    assert np.array_equal(one, again)
    assert np.array_equal(np.asarray(image), before)
    assert one.shape == before.shape
    others = [np.asarray(Corruption(kind, 3)(image, 6)), np.asarray(Corruption(kind, 3, seed=1)(image, 5))]
    assert all(np.array_equal(one, other) != kind.endswith("noise") for other in others)


@pytest.mark.parametrize("kind", KINDS)
def test_severities_are_harder_and_harder(kind):
    image = PIL.Image.fromarray(np.repeat(np.arange(0, 250, 5, dtype=np.uint8), 150).reshape(50, 50, 3))
    far = [
        np.abs(np.asarray(Corruption(kind, level)(image, 0)) / 1.0 - np.asarray(image)).mean() for level in (1, 3, 5)
    ]
    assert far == sorted(far)
    assert far[0] < far[-1]


@pytest.mark.parametrize(("kind", "severity"), [("gaussian_noise", 0), ("jpeg", 6), ("fog", 1)])
def test_no_other_corruptions(kind, severity):
    with pytest.raises(ValueError, match=r"expected one of gaussian_noise, .* at a severity from 1 to 5"):
        Corruption(kind, severity)


@pytest.mark.peers
@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("kind", KINDS)
def test_corruptions_equal_those_of_imagecorruptions(kind, severity):
    """The kept-up fork, imagecorruptions-imaug 1.1.5; its noise comes from numpy's global generator."""
    imagecorruptions = pytest.importorskip("imagecorruptions")
    smooth = np.add.outer(np.arange(64), np.arange(64))[:, :, None] * np.array([2, 1, 1.5])
    image = PIL.Image.fromarray(smooth.astype(np.uint8))
    np.random.seed(7)
    name = "jpeg_compression" if kind == "jpeg" else kind
    expected = imagecorruptions.corrupt(np.asarray(image), severity=severity, corruption_name=name)
    found = np.asarray(corrupted(image, kind, severity, np.random.RandomState(7)))
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1  # rounding of float32 there
