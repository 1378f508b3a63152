import numpy as np
import pytest
import torch
from support.references import Batch, Case, total

from clmerge.merging import Breadcrumbs, BreadcrumbsMask


def middle_kept(beta: float, gamma: float, reduce: Batch) -> Batch:
    def sparse(entries):
        kept = np.zeros(entries.size)
        order = np.argsort(-np.abs(entries.ravel()), kind="stable")
        middle = order[int(gamma * entries.size) : entries.size - int(beta * entries.size)]
        kept[middle] = entries.ravel()[middle]
        return kept.reshape(entries.shape)

    return lambda vectors, tasks: reduce([{name: sparse(v[name]) for name in v} for v in vectors], tasks)


CASES = {
    "Breadcrumbs": Case(Breadcrumbs, middle_kept(0.85, 0.007, total(0.3))),
    "Breadcrumbs tails": Case(lambda: Breadcrumbs(0.3, 0.25, scale=-0.5), middle_kept(0.3, 0.25, total(-0.5))),
}


GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("shape", [(200, 500), (16, 3), (7,), (1,), ()])
@pytest.mark.parametrize(("beta", "gamma"), [(0.85, 0.007), (0.2, 0.2), (0.0, 0.3), (0.5, 0.0), (0.0, 0.0)])
def test_exactly_the_two_tails_are_dropped(shape, beta, gamma):
    tau = torch.randn(shape, generator=GENERATOR)
    kept = BreadcrumbsMask(beta, gamma)({"w": tau})["w"].reshape(-1)
    count = tau.numel()
    order = tau.reshape(-1).abs().argsort()
    middle = order[int(beta * count) : count - int(gamma * count)]
    expected = torch.zeros(count)
    expected[middle] = tau.reshape(-1)[middle]
    assert torch.equal(kept, expected)
    assert kept.any()


def test_ties_do_not_change_how_many_are_kept():
    kept = BreadcrumbsMask(beta=0.5, gamma=0.25)({"w": torch.tensor([1.0, -1.0, 1.0, -1.0]), "empty": torch.zeros(0)})
    assert kept["w"].tolist() == [0.0, -1.0, 0.0, 0.0]
    assert kept["empty"].shape == (0,)


def test_the_input_is_left_alone():
    tau = torch.tensor([1.0, 2.0, 3.0, 4.0])
    BreadcrumbsMask(beta=0.0, gamma=0.0)({"w": tau})["w"].zero_()
    assert tau.tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(("beta", "gamma"), [(-0.1, 0.1), (0.1, -0.1), (0.9, 0.1)])
def test_shares_are_checked(beta, gamma):
    with pytest.raises(ValueError, match="beta and gamma"):
        Breadcrumbs(beta, gamma)


def test_settings_are_the_arguments():
    assert Breadcrumbs(0.5, scale=1.0).settings() == {"beta": 0.5, "gamma": 0.007, "scale": 1.0}
