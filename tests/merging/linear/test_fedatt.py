import math

import numpy as np
import pytest
import torch
from support.references import Batch, Case, each

from clmerge.merging import FedAtt


def fedatt(temperature: float, scale: float) -> Batch:
    def rule(taus):
        logits = np.linalg.norm(taus.reshape(len(taus), -1), axis=1) / temperature
        attention = np.exp(logits - logits.max())
        return scale * np.tensordot(attention / attention.sum(), taus, axes=1)

    return each(rule)


CASES = {
    "FedAtt": Case(FedAtt, fedatt(1.0, 1.0), homogeneous=False),
    "FedAtt nearest": Case(lambda: FedAtt(temperature=-2.0, scale=0.7), fedatt(-2.0, 0.7), homogeneous=False),
}


def test_each_parameter_has_its_own_attention():
    merger = FedAtt(temperature=1 / math.log(3))  # weights 3^norm
    merger.update({"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([1.0])})
    merger.update({"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([-1.0])})
    merged = merger.compute()
    assert merged["a"].tolist() == pytest.approx([1.5, 0.25])
    assert merged["b"].tolist() == pytest.approx([0.0])


def test_a_negative_temperature_prefers_what_stayed_near():
    merger = FedAtt(temperature=-1 / math.log(3))
    merger.update({"w": torch.tensor([2.0])})
    merger.update({"w": torch.tensor([1.0])})
    assert merger.compute()["w"].tolist() == pytest.approx([1.25])


def test_norms_of_hundreds_do_not_overflow_the_softmax():
    streams = [[900.0], [900.0, 100.0], [100.0, -900.0, 900.0]]
    merged = []
    for values in streams:
        merger = FedAtt()
        for value in values:
            merger.update({"w": torch.tensor([value])})
        merged.append(merger.compute()["w"].item())
    assert merged == pytest.approx([900.0, 900.0, 0.0], abs=1e-4)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="other than 0"):
        FedAtt(temperature=0.0)
