import re

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from clmerge.figures.looks import CARD, INK, SOFT, css_color, css_gradient, css_variables, ink_on, look_of
from clmerge.results.results import EXPERT, ZERO_SHOT

REFERENCES = (EXPERT, ZERO_SHOT, "task_oracle", "ensemble", "joint", "unheard of")


def contrast(first, second):
    """The contrast of two colours by WCAG 2."""

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        return float(np.dot((0.2126, 0.7152, 0.0722), linear))

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_models_look_different_from_each_other():
    looks = [look_of(f"merger{index}", index) for index in range(24)] + [look_of(name, None) for name in REFERENCES]
    assert len(set(looks)) == len(looks)


@pytest.mark.parametrize("background", [(1.0, 1.0, 0.0, 1.0), (0.2, 0.0, 0.3, 1.0), (0.13, 0.57, 0.55, 1.0)])
def test_ink_contrasts_with_its_background(background):
    assert contrast(ink_on(background), background[:3]) >= 4.5


def test_every_colour_of_a_model_is_a_variable_and_seen_on_light_and_dark_pages():
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", part))
        for part in css_variables().split("@media (prefers-color-scheme: dark)")
    )
    assert set(light) == set(dark)
    for look in [look_of(f"merger{index}", index) for index in range(8)] + [look_of(name, None) for name in REFERENCES]:
        name = re.fullmatch(r"var\(--(\w+)\)", css_color(look.color))[1]
        assert light[name] == look.color
        assert contrast(light[name], light["card"]) >= 2.9
        assert contrast(dark[name], dark["card"]) >= 4.5
    for color in (INK, SOFT):  # of text
        name = css_color(color)[6:-1]
        assert contrast(light[name], CARD) >= 4.5
        assert contrast(dark[name], dark["card"]) >= 4.5


def test_the_gradient_goes_from_the_lowest_to_the_highest_colour():
    assert re.findall("#[0-9a-f]{6}", css_gradient())[::8] == ["#440154", "#fde725"]
