"""PCB: weigh every entry of a task by its magnitude within the task and its agreement with the other tasks."""

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots, float_dtype, slot_blocks
from clmerge.merging.sparsify.sparsifier import checked_density
from clmerge.merging.stored import Stored
from clmerge.merging.threshold import kth_largest_magnitude
from clmerge.weights.task_vector import TaskVector

_ROUNDING = 1e-9  # differences of weights or scores below this share of the largest count as rounding


class _Range(NamedTuple):
    """Magnitudes between which the entries of a task are clamped."""

    low: float
    high: float

    def clamped(self, tau: Tensor) -> Tensor:
        return tau.abs().clamp_(self.low, self.high).mul_(tau.sign())

    def normalized(self, tau: Tensor) -> Tensor:
        if self.high == self.low:
            return tau.sign()
        return tau.abs().clamp_(self.low, self.high).sub_(self.low).div_(self.high - self.low).mul_(tau.sign())


class PCB(Stored):
    """Let the parameters of the tasks compete (Du et al., arXiv 2410.02396).

    1. Clamp the magnitudes of every task vector to their quantiles ``clip`` and ``1 - clip``, and let ``n_t`` be these
    magnitudes, scaled to run from 0 to 1, with their signs.
    2. Score: ``exp(T n_t^2) * sum_s tanh(n_t n_s)``: high for entries that are large in their task (intra-balancing)
    and agree in sign with the other tasks (inter-balancing).
    3. Weigh: of every task the ``density`` share of largest scores is kept; the weight ``w_t`` is the score there,
    scaled to run from 0 to 1, and 0 elsewhere.
    4. Merge: ``scale * sum(w_t tau_t) / sum(w_t)`` of the clamped vectors.

    Quantiles are those of the whole model. This is the released code for vision models; the paper writes softmax in
    place of exp and tanh. Another variant in the same repository clamps 0.01 % and takes ``tanh(tau_t * sum(tau_s))``.
    Where the kept scores of a task are all equal the code divides 0 by 0; here each weighs 1, or 0 if not positive.

    Scores change with every further task, so all task vectors are kept. State: 4 bytes per parameter and task, or none
    with a bank; ``compute()`` takes 24 bytes per parameter more, and time that grows with the square of
    the number of tasks.

    Args:
        density: Share of the entries of every task that is kept, in (0, 1] (the code's ``pcb_ratio``).
        clip: Share of the largest and of the smallest magnitudes that is clamped, in [0, 0.5).
        scale: Scaling coefficient; the paper also searches one for every task, from 0.8 to 1.3.

    Example:
        >>> merger = PCB(density=1.0, clip=0.0, scale=1.0)
        >>> merger.update({"w": torch.tensor([4.0, 0.0, 2.0])})
        >>> merger.update({"w": torch.tensor([2.0, 0.0, -4.0])})
        >>> merger.compute()
        {'w': tensor([ 3.3099,  0.0000, -4.0000])}
    """

    name = "pcb"
    summary = "mean weighted by magnitude within and agreement between the tasks"
    source = "2410.02396"
    scope = "model"  # quantiles
    reading_bytes = 24

    def __init__(self, density: float = 0.05, *, clip: float = 0.01, scale: float = 1.2) -> None:
        if not 0 <= clip < 0.5:
            raise ValueError(f"expected clip as a share in [0, 0.5), got {clip}; 1 % is 0.01")
        super().__init__()
        self.density = checked_density(density)
        self.clip = clip
        self.scale = scale

    @override
    def _overview(self) -> TaskVector:
        ranges = [self._range(position) for position in range(self.num_tasks)]
        merged, weights = self._zeros(), self._zeros()
        for position, own in enumerate(ranges):
            for name, weight in self._weights(position, ranges).items():
                merged[name].addcmul_(weight, own.clamped(self._tau(position, name).double()))
                weights[name].add_(weight)
        for name, weight in weights.items():
            merged[name].div_(weight.clamp_(min=1e-12)).mul_(self.scale)
        return merged

    @override
    def _read(self, name: str, slots: Slots, overview: TaskVector) -> Tensor:
        return overview.pop(name).to(float_dtype(slots))

    def _zeros(self) -> TaskVector:
        return {name: torch.zeros_like(self._tau(0, name), dtype=torch.float64) for name in self._shapes}

    def _range(self, position: int) -> _Range:
        """Return the quantiles of a task's magnitudes."""
        taus = [self._tau(position, name) for name in self._shapes]
        total = sum(tau.numel() for tau in taus)
        if not total:
            return _Range(0.0, 0.0)
        low, high = int(total * self.clip), max(int(total * (1 - self.clip) - 1), 0)
        return _Range(*(kth_largest_magnitude(taus, total - rank).value for rank in (low, high)))

    def _weights(self, position: int, ranges: list[_Range]) -> TaskVector:
        """Return the weight of every entry of a task."""
        scores = self._zeros()
        for name, slots in self._held().items():
            for block, (out,) in slot_blocks(slots, scores[name]):
                signed = [
                    limits.normalized(tau.double()) for limits, tau in zip(ranges, self._taus(block), strict=True)
                ]
                own = signed[position]
                for other in signed:
                    out.add_(torch.tanh(own * other))
                out.mul_(torch.exp(own.square() * len(ranges)))
        filled = [score for score in scores.values() if score.numel()]
        if not filled:
            return scores
        # Shifted so that the smallest is 0, scores are magnitudes, for which thresholds can be computed.
        smallest, largest = min(float(s.min()) for s in filled), max(float(s.max()) for s in filled)
        rounding = _ROUNDING * max(abs(smallest), abs(largest))
        for score in filled:
            score.sub_(smallest)
        total = sum(score.numel() for score in filled)
        rank = min(int(total * (1 - self.density)), total - 1)
        threshold = kth_largest_magnitude(filled, total - rank).value
        span = largest - smallest - threshold
        for score in filled:
            if span <= rounding:
                score.copy_(score >= threshold - rounding).mul_(largest > 0)
            else:
                torch.nn.functional.threshold(score.sub_(threshold).div_(span), _ROUNDING, 0.0, inplace=True)
        return scores
