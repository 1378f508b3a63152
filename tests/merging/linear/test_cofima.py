import numpy as np
import pytest
import torch
from support.references import Batch, Case, fishers

from clmerge.merging import CoFiMA, WiSEFT


def cofima(alpha: float, use_fisher: bool = True, clip: float = np.inf) -> Batch:
    def batch(vectors, tasks):
        weights = fishers(vectors, tasks)
        if not use_fisher:
            weights = [{name: np.ones(f.shape) for name, f in w.items()} for w in weights]
        merged = vectors[0]
        for position in range(1, len(vectors)):
            old, new = ({name: np.minimum(f, clip) for name, f in weights[position - d].items()} for d in (1, 0))
            merged = {
                name: ((1 - alpha) * old[name] * merged[name] + alpha * new[name] * vectors[position][name])
                / ((1 - alpha) * old[name] + alpha * new[name])
                for name in merged
            }
        return merged

    return batch


CASES = {
    "CoFiMA": Case(CoFiMA, cofima(0.5)),
    "CoFiMA clip": Case(lambda: CoFiMA(0.3, clip=1.0), cofima(0.3, clip=1.0)),
    "CoFiMA without Fisher": Case(lambda: CoFiMA(0.4, use_fisher=False), cofima(0.4, use_fisher=False)),
}


def merged(merger, *pairs):
    for tau, fisher in pairs:
        merger.update({"w": torch.tensor(tau)}, statistics={"fisher": {"w": torch.tensor(fisher)}})
    return merger.compute()["w"]


def test_only_the_fisher_of_the_task_before_counts():
    tau = merged(CoFiMA(0.5), ([0.0], [100.0]), ([4.0], [1.0]), ([8.0], [1.0]))
    torch.testing.assert_close(tau, torch.tensor([(4 / 101 + 8) / 2]))


def test_no_information_interpolates_instead_of_dividing_zero_by_zero():
    tau = merged(CoFiMA(0.25), ([0.0, 0.0], [0.0, 0.0]), ([4.0, 4.0], [0.0, 1.0]))
    torch.testing.assert_close(tau, torch.tensor([1.0, 4.0]))


def test_equal_fishers_above_the_clip_are_the_plain_interpolation():
    pairs = ([1.0], [1.0]), ([5.0], [7.0]), ([2.0], [3.0])
    without = CoFiMA(0.4, use_fisher=False)
    assert without.requires == frozenset()
    torch.testing.assert_close(merged(CoFiMA(0.4, clip=1e-4), *pairs), merged(without, *pairs))


def test_the_first_task_is_taken_whole_unlike_in_the_chain_from_the_base_model():
    vector = {"w": torch.tensor([2.0])}
    coma, wise = CoFiMA(0.5, use_fisher=False), WiSEFT(0.5)
    coma.update(vector)
    wise.update(vector)
    assert (coma.compute()["w"].item(), wise.compute()["w"].item()) == (2.0, 1.0)


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"alpha": 1.5}, {"floor": 0.0}, {"clip": 1e-13}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=r"expected (alpha|0 < floor)"):
        CoFiMA(**settings)
