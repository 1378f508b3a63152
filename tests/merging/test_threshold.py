import weakref

import pytest
import torch

from clmerge.merging import threshold
from clmerge.merging.blocks import CPU_BLOCK
from clmerge.merging.threshold import _by_sample, kth_largest_magnitude

SHAPES = [(17,), (0,), (3, 5), (300_001,)]


def tensors(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    makers = {
        "normal": lambda shape: torch.randn(shape, generator=generator),
        "few values": lambda shape: torch.randint(-3, 4, shape, generator=generator).float(),
        "mostly zero": lambda shape: torch.randn(shape, generator=generator).clamp(min=2) - 2,
        "one value": lambda shape: torch.full(shape, -0.1),
        "denormal": lambda shape: torch.randn(shape, generator=generator) * 1e-40,
        "huge": lambda shape: torch.randn(shape, generator=generator) * 1e37,
    }
    return [makers[kind](shape).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "few values", "mostly zero", "one value", "denormal", "huge"])
def test_equals_a_sort(kind, dtype):
    candidates = tensors(kind, dtype)
    ordered = torch.cat([tensor.reshape(-1) for tensor in candidates]).abs().double().sort(descending=True).values
    for k in (1, 2, 1000, len(ordered) // 5, len(ordered) // 2, len(ordered) - 1, len(ordered)):
        value = ordered[k - 1].item()
        surplus = int((ordered >= value).sum()) - k
        assert kth_largest_magnitude(candidates, k) == (value, surplus)


def test_small_and_strided_tensors():
    assert kth_largest_magnitude([torch.tensor(-2.0), torch.tensor([[1.0, 3.0]]).t()], 2) == (2.0, 0)


@pytest.mark.parametrize("k", [0, 4])
def test_rank_must_exist(k):
    with pytest.raises(ValueError, match="between 1 and the 3 entries"):
        kth_largest_magnitude([torch.zeros(3)], k)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_sample_that_misleads_costs_only_time(factor):
    tau = torch.randn(64**3, generator=torch.Generator().manual_seed(0))
    step = 65  # what is sampled of 64 ** 3 entries, or 63 in another rounding
    for index in (step - 2, step):
        tau[::index] *= factor
    ordered = tau.abs().sort(descending=True).values
    for k in (tau.numel() // 5, tau.numel() // 2):
        assert kth_largest_magnitude([tau], k) == (ordered[k - 1].item(), 0)
    assert _by_sample([tau], [tau[::step]], torch.float32, tau.numel(), tau.numel() // 5) is None


def test_more_candidates_than_the_sample_promises_are_not_collected():
    tau = torch.linspace(0.67, 0.68, 64**3)  # beside the median of what is sampled, which is spread much wider
    step = 65
    tau[::step] = torch.randn(len(tau[::step]), generator=torch.Generator().manual_seed(0))
    k = tau.numel() // 2
    assert _by_sample([tau], [tau[::step]], torch.float32, tau.numel(), k) is None
    value = tau.abs().sort(descending=True).values[k - 1].item()
    assert kth_largest_magnitude([tau], k).value == value


def test_no_candidates_are_kept_between_the_temporaries_of_blocks(monkeypatch):
    found, split = [], threshold._split

    def watched(*arguments):
        assert sum(one() is not None for one in found) <= 1, "only those of the block before"
        above, inside = split(*arguments)
        found.append(weakref.ref(inside))
        return above, inside

    monkeypatch.setattr(threshold, "_split", watched)
    tau = torch.randn(5 * CPU_BLOCK * torch.get_num_threads(), generator=torch.Generator().manual_seed(0))
    assert kth_largest_magnitude([tau], 1000).value == tau.abs().sort(descending=True).values[999].item()
    assert len(found) >= 5
