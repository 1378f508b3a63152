from types import SimpleNamespace

import pytest
import pytorch_lightning.strategies
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from support.tiny import ForeignModule

from clmerge.callbacks.ranks import refuse_sharding
from clmerge.models import add_lora


@pytest.mark.parametrize("kind", [ModelParallelStrategy, pytorch_lightning.strategies.ModelParallelStrategy])
def test_layers_that_compute_their_weights_are_not_sharded(kind):
    module = ForeignModule()
    sharded = SimpleNamespace(strategy=kind())
    refuse_sharding(sharded, module)
    add_lora(module.net, "3")
    refuse_sharding(SimpleNamespace(strategy=DDPStrategy()), module)
    with pytest.raises(RuntimeError, match=r"got LoRALinear at 'net\.3', which FSDP2 cannot shard; use strategy='ddp'"):
        refuse_sharding(sharded, module)
