"""DARE: drop most of every task vector at random, rescale the rest, then merge."""

from clmerge.merging.linear.arithmetic import TaskArithmetic
from clmerge.merging.merger import Merger
from clmerge.merging.pipeline import Pipeline
from clmerge.merging.sparsify.sparsifier import RandomDrop, Rescale


class DARE(Pipeline):
    """Drop and rescale, then merge with any rule (Yu et al., arXiv 2311.03099).

    Every entry of a task vector is dropped with probability ``drop_rate`` and what is kept is divided by
    ``1 - drop_rate``, which preserves the expectation. The masks depend only on seed, task and parameter name. State:
    the reducer's.

    Args:
        drop_rate: Share of the entries that is dropped, in [0, 1); the paper uses 0.9 and more.
        rescale: ``"probability"`` as above (the paper); ``"l1"`` restores each tensor's L1 norm (mergekit);
            ``"none"`` does neither (the released code without its rescale flag).
        seed: Seed of the masks.
        scale: Scaling coefficient of task arithmetic, the default reducer. Default: that of ``TaskArithmetic``.
        reducer: Another rule that merges, with its own scale, e.g. ``TIES(density=1.0)``.

    Raises:
        ValueError: If both ``scale`` and ``reducer`` are given.

    Example:
        >>> import torch
        >>> merger = DARE(drop_rate=0.5, scale=1.0)
        >>> merger.update({"w": torch.ones(1000)})
        >>> merger.compute()["w"].unique()
        tensor([0., 2.])
    """

    name = "dare"
    summary = "drop entries at random, rescale, then any rule (default: task arithmetic)"
    source = "2311.03099"

    def __init__(
        self,
        drop_rate: float = 0.9,
        *,
        rescale: Rescale = "probability",
        seed: int = 0,
        scale: float | None = None,
        reducer: Merger | None = None,
    ) -> None:
        if scale is not None and reducer is not None:
            raise ValueError(f"expected scale or reducer, got scale={scale} and {reducer!r}; set the reducer's scale")
        inner = reducer or (TaskArithmetic() if scale is None else TaskArithmetic(scale))
        super().__init__(inner, sparsifier=RandomDrop(drop_rate, rescale=rescale, seed=seed))
        self.drop_rate = drop_rate
        self.rescale: Rescale = rescale
        self.seed = seed
        self.scale = scale
        self.reducer = reducer
