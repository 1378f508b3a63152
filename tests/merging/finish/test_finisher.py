import pytest
import torch

from clmerge.merging import ClipNorm, Scale


def test_scale_multiplies_every_parameter():
    finished = Scale(-2.0).finish({"a": torch.ones(2), "b": torch.tensor(3.0)})
    assert finished["a"].tolist() == [-2.0, -2.0]
    assert finished["b"].item() == -6.0


def test_clip_bounds_the_norm_of_the_whole_vector():
    def clipped(max_norm):
        vector = {"a": torch.tensor([0.0, 6.0]), "b": torch.tensor(8.0)}
        return [tensor.tolist() for tensor in ClipNorm(max_norm).finish(vector).values()]

    assert clipped(5.0) == [[0.0, 3.0], 4.0]
    assert clipped(10.0) == [[0.0, 6.0], 8.0]
    assert clipped(11.0) == [[0.0, 6.0], 8.0]


def test_zero_stays_zero_and_bounds_are_positive():
    assert ClipNorm(1.0).finish({"a": torch.zeros(2)})["a"].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="positive max_norm, got 0"):
        ClipNorm(0)
