import pytest
import torch

from clmerge.merging.blocks import CPU_BLOCK, blocks


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 24])
def test_pieces_are_views_that_cover_everything_once(numel):
    left, right = torch.zeros(numel), torch.arange(numel)
    for piece, other in blocks(left, right, cpu_block=8):
        assert 0 < len(piece) <= 8
        piece += other
    assert torch.equal(left, right.float())


def test_every_thread_gets_a_block():
    (first, *_) = blocks(torch.zeros(100 * CPU_BLOCK))
    assert len(first[0]) == CPU_BLOCK * min(torch.get_num_threads(), 8)
