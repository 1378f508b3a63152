import torch

from clmerge.merging import Scale


def test_scale_multiplies_every_parameter():
    finished = Scale(-2.0).finish({"a": torch.ones(2), "b": torch.tensor(3.0)})
    assert finished["a"].tolist() == [-2.0, -2.0]
    assert finished["b"].item() == -6.0
