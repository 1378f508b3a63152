"""Random mix: every entry comes from one task, chosen at random."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots, slot_blocks
from clmerge.merging.merger import Merger
from clmerge.merging.step import Step
from clmerge.seeds import seeded_uniform


class RandomMix(Merger):
    """Take every entry from one task, with equal probability for all tasks.

    A baseline of MagMax (Marczak et al., arXiv 2407.06322).
    It is streamed by reservoir sampling: the t-th task vector replaces each entry with probability 1/t, so that
    every task has probability 1/t at every t. The result has exactly the distribution of the batch rule; the
    draws depend on seed, task and parameter name. State: 4 bytes per parameter.

    Args:
        scale: Scaling coefficient; 1 as in the released code.
        seed: Seed of the draws.

    Example:
        >>> import torch
        >>> merger = RandomMix()
        >>> for value in (1.0, 2.0):
        ...     merger.update({"w": torch.full((1000,), value)})
        >>> sorted(merger.compute()["w"].unique().tolist())
        [1.0, 2.0]
    """

    name = "random_mix"
    summary = "every entry from one task, at random (baseline)"
    source = "2407.06322"
    order_free = False
    slots = ("pick",)

    def __init__(self, scale: float = 1.0, *, seed: int = 0) -> None:
        super().__init__()
        self.scale = scale
        self.seed = seed

    @override
    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        uniform = seeded_uniform(tau, seed=self.seed, task=step.task, name=name, purpose="mix")
        for block, (piece, drawn) in slot_blocks(slots, tau, uniform):
            replace = drawn.lt_(1 / (step.position + 1)).to(block["pick"].dtype)
            block["pick"].lerp_(piece.to(replace.dtype), replace)  # weights of 0 and 1 select exactly

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        return slots["pick"] * self.scale
