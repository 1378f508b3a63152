import numpy as np
import pytest

from clmerge.streams import SklearnDigits


def test_all_images_are_used_once_and_stretched():
    source = SklearnDigits()
    train, test = source.train(), source.test()
    assert len(train) + len(test) == 1797
    assert not set(train.indices) & set(test.indices)
    assert set(train.targets) == set(test.targets) == set(range(10))
    image = train[0][0]
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert max(np.asarray(train[i][0]).max() for i in range(20)) == 255


def test_seed_decides_the_cut():
    assert SklearnDigits(seed=1).test().indices == SklearnDigits(seed=1).test().indices
    assert SklearnDigits(seed=1).test().indices != SklearnDigits(seed=2).test().indices


def test_names_and_prompts():
    source = SklearnDigits()
    assert source.class_names[7] == "seven"
    assert source.templates == ('a photo of the number: "{}".',)


def test_test_fraction_out_of_range():
    with pytest.raises(ValueError, match=r"test_fraction in \(0, 1\), got 0"):
        SklearnDigits(test_fraction=0)
