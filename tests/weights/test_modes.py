import pytest
from torch import nn

from clmerge.weights.modes import eval_mode


def test_eval_mode_gives_every_part_its_mode_back():
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    net[1].eval()

    def fail():
        with eval_mode(net):
            assert not any(part.training for part in net.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [part.training for part in net.modules()] == [True, True, False, False]
