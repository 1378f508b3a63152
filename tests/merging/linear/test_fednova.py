import numpy as np
import pytest
import torch
from support.references import Batch, Case, stacked, statistic

from clmerge.merging import FedNova


def fednova(scale: float) -> Batch:
    def batch(vectors, tasks):
        samples = np.array([statistic("samples", task) for task in tasks])
        steps = np.array([statistic("steps", task) for task in tasks])
        shares = samples / samples.sum()
        weights = scale * (shares * steps).sum() * shares / steps
        return {name: np.tensordot(weights, stacked(vectors, name), axes=1) for name in vectors[0]}

    return batch


CASES = {
    "FedNova": Case(FedNova, fednova(1.0)),
    "FedNova scale": Case(lambda: FedNova(scale=0.5), fednova(0.5)),
}


def merged(merger, values, statistics):
    for value, measured in zip(values, statistics, strict=True):
        merger.update({"w": torch.tensor(value)}, statistics=measured)
    return merger.compute()["w"].tolist()


def test_fednova_with_equal_steps_is_the_mean_by_samples():
    statistics = [{"samples": 30, "steps": 7}, {"samples": 10, "steps": 7}]
    assert merged(FedNova(), [[1.0], [5.0]], statistics) == pytest.approx([2.0])


def test_fednova_takes_the_mean_number_of_steps_at_the_mean_speed():
    # Shares 1/4 and 3/4, steps 10 and 2: 4 mean steps, mean of tau per step 1/4 * 2 + 3/4 * 4.
    statistics = [{"samples": 10, "steps": 10}, {"samples": 30, "steps": 2}]
    assert merged(FedNova(), [[20.0], [8.0]], statistics) == pytest.approx([4 * 3.5])


def test_steps_must_be_positive():
    with pytest.raises(ValueError, match="positive number as 'steps'"):
        merged(FedNova(), [[1.0]], [{"samples": 10, "steps": 0}])
