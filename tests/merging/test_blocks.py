import pytest
import torch

from clmerge.merging.blocks import CPU_BLOCK, blocks


@pytest.mark.parametrize("numel", [0, 1, CPU_BLOCK, CPU_BLOCK + 1, 3 * CPU_BLOCK])
def test_pieces_are_views_that_cover_everything_once(numel):
    left, right = torch.zeros(numel), torch.arange(numel)
    for piece, other in blocks(left, right):
        assert 0 < len(piece) <= CPU_BLOCK
        piece += other
    assert torch.equal(left, right.float())
