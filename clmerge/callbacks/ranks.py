"""Whether all processes of a distributed run merged alike."""

from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer

from clmerge.weights import State, fingerprint


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
