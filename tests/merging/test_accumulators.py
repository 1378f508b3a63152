import torch

from clmerge.merging.accumulators import allocate, copied, float_dtype, slot_blocks, widen

VECTOR = {"w": torch.ones(2, 3, dtype=torch.bfloat16), "d": torch.ones(1, dtype=torch.float64)}


def test_accumulators_are_float32_or_float64():
    slots = allocate(VECTOR, {"sum": None, "count": torch.int16}, None)
    assert float_dtype(slots["w"]) == torch.float32
    assert float_dtype(slots["d"]) == torch.float64
    assert slots["w"]["count"].dtype == torch.int16
    assert not slots["w"]["sum"].any()


def test_copies_are_apart():
    slots = allocate(VECTOR, {"sum": None}, None)
    copied(slots)["w"]["sum"].fill_(1)
    assert not slots["w"]["sum"].any()


def test_widening_keeps_the_counts():
    slots = allocate(VECTOR, {"sum": None, "count": torch.int16}, None)
    slots["w"]["count"].fill_(7)
    widen(slots, {"sum": None, "count": torch.int32})
    assert slots["w"]["count"].dtype == torch.int32
    assert slots["w"]["count"].eq(7).all()


def test_pieces_of_accumulators_are_views_and_tau_may_be_strided():
    slots = {"sum": torch.zeros(2, 3)}
    tau = torch.arange(6.0).view(3, 2).t()
    for block, (piece,) in slot_blocks(slots, tau):
        block["sum"].add_(piece)
    assert torch.equal(slots["sum"], tau)
