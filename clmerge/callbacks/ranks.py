"""Checks of a distributed run: equal merged weights on all ranks, and no unsupported sharding."""

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.distributed.tensor import DTensor

from clmerge.lightning_compat import is_lightning
from clmerge.weights import State, fingerprint
from clmerge.weights.parametrization import parametrized


def check_same_on_all_ranks(trainer: Trainer, vectors: Sequence[State]) -> None:
    """Compare merged vectors between the processes by hash; a collective.

    Raises:
        RuntimeError: If they differ.
    """
    mine = [fingerprint(vector) for vector in vectors]
    prints: list[list[str] | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(prints, mine)
    if any(other != mine for other in prints):
        raise RuntimeError(
            f"expected the same merged weights on all {trainer.world_size} ranks, got different ones: "
            "the ranks trained different models"
        )


def refuse_parts(module: LightningModule, callback: str) -> None:
    """Refuse a module of whose weights every process holds a part (FSDP2), for a callback that reads them whole.

    Raises:
        RuntimeError: If there is such a parameter.
    """
    if sharded := next((name for name, p in module.named_parameters() if isinstance(p, DTensor)), None):
        raise RuntimeError(
            f"expected whole weights in every process for {callback}, got a part of {sharded}: use a strategy that "
            "does not shard, such as ddp"
        )


def refuse_sharding(trainer: Trainer, module: LightningModule) -> None:
    """Refuse FSDP2 for modes of tuning whose layers compute their weights on access.

    Raises:
        RuntimeError: If there is such a layer; the message names the strategy to use instead.
    """
    if is_lightning(trainer.strategy, "ModelParallelStrategy"):
        for prefix, part in parametrized(module).items():
            if not part.shardable:
                raise RuntimeError(
                    f"expected ordinary layers under ModelParallelStrategy, got {type(part).__name__} at "
                    f"{prefix.rstrip('.')!r}, which FSDP2 cannot shard; use strategy='ddp'"
                )
