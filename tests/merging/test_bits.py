import pytest
import torch

from clmerge.merging.bits import BitWriter, pack_bits, unpack_bits

GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_packing_and_unpacking_are_inverse(count):
    mask = torch.rand(count, generator=GENERATOR) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-count // 8)
    assert torch.equal(unpack_bits(packed, 0, count), mask)


def test_any_stretch_can_be_read():
    mask = torch.rand(40, generator=GENERATOR) < 0.5
    packed = pack_bits(mask)
    for start in range(40):
        for count in range(40 - start + 1):
            assert torch.equal(unpack_bits(packed, start, count), mask[start : start + count])


def test_masks_follow_each_other_without_gaps():
    masks = [torch.rand(shape, generator=GENERATOR) < 0.5 for shape in [(3,), (4, 5), (0, 2), (), (1,), (64,), (9,)]]
    writer = BitWriter()
    for mask in masks:
        writer.write(mask)
    assert torch.equal(writer.packed(), pack_bits(torch.cat([mask.reshape(-1) for mask in masks])))
    assert BitWriter().packed().numel() == 0
