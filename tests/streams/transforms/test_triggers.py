import numpy as np
import PIL.Image
import pytest

from clmerge.streams.transforms import Blended, Patch


def pixels(image):
    return np.asarray(image).astype(float)


def test_a_blended_image_is_a_mean_with_one_pattern():
    generator = np.random.default_rng(0)
    images = [PIL.Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)) for _ in range(2)]
    pattern = pixels(Blended(1.0, seed=3)(images[0], 0))
    assert pattern.std() > 30
    for image in images:
        found = pixels(Blended(0.25, seed=3)(image, 7))
        assert np.abs(found - (0.75 * pixels(image) + 0.25 * pattern)).max() <= 1
    assert (pixels(Blended(1.0, seed=4)(images[0], 0)) != pattern).any()


def test_the_triggers_leave_the_image_as_it_was():
    image = PIL.Image.new("RGB", (8, 8))
    for trigger in (Blended(0.5), Patch()):
        assert pixels(trigger(image, 0)).sum() > 0
        assert pixels(image).sum() == 0


@pytest.mark.parametrize("strength", [0.0, 1.5])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match="expected a strength above 0"):
        Blended(strength)
