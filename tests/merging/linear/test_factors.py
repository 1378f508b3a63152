import numpy as np
import pytest
import torch
from support.references import Case, shapes_of, stacked, weights_of

from clmerge.merging import FactorProduct


def product(scale):
    def batch(vectors, tasks):
        base = weights_of(shapes_of(vectors))
        return {
            name: theta * np.prod(1 + scale * stacked(vectors, name) / theta, axis=0) - theta
            for name, theta in base.items()
        }

    return batch


CASES = {
    "FactorProduct": Case(FactorProduct, product(1.0), homogeneous=False, condition=100),
    "FactorProduct weak": Case(lambda: FactorProduct(0.1), product(0.1), homogeneous=False, condition=10),
}


def test_factors_of_ia3_are_multiplied():
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    factors = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    merger = FactorProduct()
    for factor in factors:
        merger.update({"w": theta * (factor - 1)}, statistics={"weights": {"w": theta}})
    torch.testing.assert_close(theta + merger.compute()["w"], theta * factors.prod(dim=0))


def test_where_the_base_is_zero_changes_are_added():
    merger = FactorProduct()
    for change in (1.0, 2.0):
        merger.update({"w": torch.tensor([change])}, statistics={"weights": {"w": torch.zeros(1)}})
    assert merger.compute()["w"].tolist() == [3.0]


def test_the_base_is_needed():
    with pytest.raises(ValueError, match="base model's 'w'"):
        FactorProduct().update({"w": torch.ones(2)}, statistics={"weights": {}})
