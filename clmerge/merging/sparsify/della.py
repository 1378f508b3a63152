"""DELLA: drop entries at random, small ones more likely, rescale the rest, elect signs, merge."""

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.checks import checked_choice
from clmerge.merging.merger import Merger
from clmerge.merging.orientation import from_output_rows, output_rows
from clmerge.merging.pipeline import Pipeline
from clmerge.merging.sign.ties import TIES
from clmerge.merging.sparsify.sparsifier import Rescale, Sparsifier
from clmerge.seeds import seeded_uniform

_BLOCK = 1 << 18  # entries whose ranks are in memory together; a longer row is ranked as a whole


def keep_probabilities(rows: Tensor, density: float, window: float) -> Tensor:
    """Return the keep probability of every entry, by the rank of its magnitude in its row.

    Args:
        rows: Entries, shape ``(rows, columns)``.
        density: Probability at the middle rank, and in rows of one entry.
        window: Difference between the keep probabilities of the largest and the smallest entry of a row.

    Returns:
        float64, same shape; of equal magnitudes the later has the higher rank.

    Example:
        >>> keep_probabilities(torch.tensor([[3.0, -1.0, 2.0]]), density=0.5, window=0.5)
        tensor([[0.7500, 0.2500, 0.5000]], dtype=torch.float64)
    """
    columns = rows.shape[1]
    if columns < 2:
        return torch.full(rows.shape, density, dtype=torch.float64, device=rows.device)
    by_rank = (
        density - window / 2 + window * torch.arange(columns, dtype=torch.float64, device=rows.device).div_(columns - 1)
    )
    order = rows.abs().argsort(dim=1, stable=True)
    return torch.empty(rows.shape, dtype=torch.float64, device=rows.device).scatter_(1, order, by_rank.expand_as(order))


class MagnitudeDrop(Sparsifier):
    """Drop entries at random, small ones more often than large ones (DELLA's MagPrune, arXiv 2406.11617).

    In every row (the weights of one output; vectors are one row), the keep probability rises linearly with the rank of
    the magnitude, from ``1 - drop_rate - window / 2`` to ``1 - drop_rate + window / 2``. A row of a convolution holds
    all weights of one output channel; CLIP's ``proj`` and ``text_projection``, whose shape is (in, out), have their
    outputs in columns. The mask depends only on seed, task, parameter name and the ranks.

    Args:
        drop_rate: Share of the entries that is dropped, in [0, 1).
        window: Difference between the largest and the smallest keep probability of a row.
        rescale: ``"probability"`` divides what is kept by its keep probability (the paper); ``"l1"`` restores each
            tensor's L1 norm (mergekit); ``"none"`` does neither.
        seed: Seed of the masks.
    """

    name = "magnitude_drop"

    def __init__(
        self, drop_rate: float = 0.3, *, window: float = 0.14, rescale: Rescale = "probability", seed: int = 0
    ) -> None:
        if window < 0 or not window / 2 <= drop_rate < 1 - window / 2:
            raise ValueError(
                f"expected window >= 0 and drop_rate in [window / 2, 1 - window / 2), got drop_rate={drop_rate} and "
                f"window={window}; keep probabilities are 1 - drop_rate, give or take half the window"
            )
        self.drop_rate = drop_rate
        self.window = window
        self.rescale: Rescale = checked_choice("rescale", rescale, Rescale)
        self.seed = seed

    @override
    def sparsify(self, name: str, tau: Tensor, task: int, plan: None) -> Tensor:
        if not tau.numel():
            return tau.clone()
        uniform = seeded_uniform(tau, seed=self.seed, task=task, name=name, purpose="della")
        nodes = output_rows(name, tau)
        kept = torch.empty_like(nodes)
        tensors = (nodes, output_rows(name, uniform), kept)
        height = max(1, _BLOCK // nodes.shape[1])
        for rows, drawn, out in zip(*(torch.split(tensor, height) for tensor in tensors), strict=True):
            probabilities = keep_probabilities(rows, 1 - self.drop_rate, self.window)
            mask = drawn < probabilities
            torch.mul(rows, mask, out=out)
            if self.rescale == "probability":
                out.div_(probabilities)
        if self.rescale == "l1" and (rest := float(kept.abs().sum(dtype=torch.float64))):
            kept.mul_(float(tau.abs().sum(dtype=torch.float64)) / rest)
        return from_output_rows(name, kept, tuple(tau.shape)).contiguous()


class DELLA(Pipeline):
    """Drop by magnitude, elect signs, fuse (Deep et al., arXiv 2406.11617).

    1. Drop: every entry is kept with a probability that rises with the rank of its magnitude in its row, and what is
    kept is divided by that probability, which preserves the expectation.
    2. Elect: the sign of an entry is the sign of its sum over the tasks, positive if that is zero.
    3. Fuse: the mean of the non-zero entries that have the elected sign; times ``scale``.

    The masks depend only on seed, task, parameter name and ranks. State: the reducer's, by default 12 bytes per
    parameter. Random numbers are drawn differently from the released code, so masks agree only in distribution.

    Args:
        drop_rate: Share of the entries that is dropped, in [0, 1).
        window: Difference between the largest and the smallest keep probability of a row.
        rescale: ``"probability"`` as above (the paper and its code); ``"l1"`` restores each tensor's L1 norm
            (mergekit); ``"none"`` does neither.
        seed: Seed of the masks.
        scale: Scaling coefficient of the default reducer. Default: 1.1, as in the released code's example.
        reducer: Another rule that elects and fuses, with its own scale, e.g. ``TaskArithmetic()``. Default:
            ``TIES(density=1.0, trim="tensor")`` with ``scale``.

    Raises:
        ValueError: If both ``scale`` and ``reducer`` are given, or a keep probability is not in (0, 1].

    Example:
        >>> merger = DELLA(drop_rate=0.0, window=0.0, scale=1.0)
        >>> merger.update({"w": torch.tensor([1.0, -1.0])})
        >>> merger.update({"w": torch.tensor([3.0, 4.0])})
        >>> merger.compute()
        {'w': tensor([2., 4.])}
    """

    name = "della"
    summary = "drop entries by magnitude at random, rescale, then elect signs (or any rule)"
    source = "2406.11617"

    def __init__(
        self,
        drop_rate: float = 0.3,
        *,
        window: float = 0.14,
        rescale: Rescale = "probability",
        seed: int = 0,
        scale: float | None = None,
        reducer: Merger | None = None,
    ) -> None:
        if scale is not None and reducer is not None:
            raise ValueError(f"expected scale or reducer, got scale={scale} and {reducer!r}; set the reducer's scale")
        inner = reducer or TIES(density=1.0, trim="tensor", scale=1.1 if scale is None else scale)
        super().__init__(inner, sparsifier=MagnitudeDrop(drop_rate, window=window, rescale=rescale, seed=seed))
        self.drop_rate = drop_rate
        self.window = window
        self.rescale: Rescale = checked_choice("rescale", rescale, Rescale)
        self.seed = seed
        self.scale = scale
        self.reducer = reducer
