"""Truncate the merged vector to a low rank, such as that of the merged adapters."""

from typing_extensions import override

from clmerge.merging.finish.finisher import Finisher
from clmerge.merging.spectral.adapters import adapter_of, check_rank
from clmerge.weights.task_vector import TaskVector


class TruncateRank(Finisher):
    """Keep the leading singular vectors of every merged matrix, so that merged adapters fit one adapter of this rank.

    After ``TaskArithmetic`` it is what PEFT calls ``svd``; after ``KnOTS`` it is KnOTS at constant rank. Meant for
    LoRA, where the merged parameters are adapted matrices; a packed ``in_proj_weight`` counts as three, as in LoRA.

    Args:
        rank: Singular vectors to keep.

    Raises:
        ValueError: For a rank below 1.

    Example:
        >>> import torch
        >>> TruncateRank(1).finish({"w": torch.diag(torch.tensor([3.0, 1.0]))})["w"].round(decimals=4)
        tensor([[3., 0.],
                [0., 0.]])
    """

    name = "truncate_rank"
    scope = "parameter"

    def __init__(self, rank: int) -> None:
        check_rank(rank)
        self.rank = rank

    @override
    def finish(self, vector: TaskVector) -> TaskVector:
        found = adapter_of(vector, self.rank)
        return vector | {name: product.dense().to(vector[name].dtype) for name, product in found.items()}
