"""Compute task vectors of open checkpoints, a few parameters at a time."""

from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from typing import Literal

import torch
from torch import Tensor

from clmerge.checkpoints.reader import Checkpoint
from clmerge.merging import Merger, Statistics
from clmerge.merging.vectors import Pack, Shape
from clmerge.weights.task_vector import accumulator_dtype

COUNTS = ("samples", "steps")
"""Counts that the header of a task vector may hold."""

_RUN = 16  # float32 entries of a cache line


Origin = Literal["base", "zero"]
"""Whether differences to the base or the weights themselves are merged."""


class CheckpointVectors:
    """``theta_t - theta0`` of models on disk, in float32 (float64 where either side is float64).

    Args:
        base: The base model.
        models: Fine-tuned models, or task vectors, which are used unchanged.
        names: The parameters that are merged.
        needed: Names of the statistics that the rule requires.
        origin: ``"zero"`` for ``theta_t`` instead.
        tasks: Task index of every model. Default: their positions.
        on_bytes: Called after every parameter with the number of bytes read from a model.
    """

    def __init__(
        self,
        base: Checkpoint,
        models: Sequence[Checkpoint],
        names: Sequence[str],
        *,
        needed: Set[str] = frozenset(),
        origin: Origin = "base",
        tasks: Sequence[int] | None = None,
        on_bytes: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.base = base
        self.models = models
        self.shapes: Mapping[str, Shape] = {name: base.entries[name].shape for name in names}
        self.tasks: Sequence[int] = range(len(models)) if tasks is None else list(tasks)
        self.origin: Origin = origin
        self._needed = needed
        self._on_bytes = on_bytes
        # One buffer is reused: new memory would take as much time as the subtraction.
        self._buffers: dict[torch.dtype, Tensor] = {}

    def dtype(self, position: int, name: str) -> torch.dtype:
        """Return the dtype of the result of ``read``."""
        model = self.models[position]
        sides = [model.entries[name].dtype] if name in model.entries else []
        if self._sign(model, name):
            sides.append(self.base.entries[name].dtype)
        return torch.float64 if torch.float64 in sides else torch.float32

    def kind(self, name: str) -> Hashable:
        """Return a key that is equal for parameters that can be read together."""
        sides = [(model.entries.get(name), self._sign(model, name)) for model in self.models]
        return self.base.entries[name].dtype, *((entry and entry.dtype, sign) for entry, sign in sides)

    def read(self, position: int, pack: Pack, piece: slice | None = None) -> Tensor:
        """Return parameters of one kind of one task vector, flat, or a piece of them; the next call overwrites it."""
        model, first = self.models[position], pack.names[0]
        theta = _flat(model, pack, piece)
        if first in model.entries:
            self._on_bytes(theta.nbytes)
        sign = self._sign(model, first)
        if not sign:
            return theta.to(accumulator_dtype(theta))
        start = _flat(self.base, pack, piece)
        dtype = accumulator_dtype(theta, start)
        tau = self._buffer(dtype, theta.numel())
        if theta.dtype == start.dtype == dtype:
            return torch.add(theta, start, alpha=sign, out=tau)
        return tau.copy_(theta).add_(start.to(dtype), alpha=sign)

    def sample(self, position: int, pack: Pack, step: int) -> Tensor:
        """Return one of ``step`` entries of parameters of one task vector, flat, in short runs."""
        model, first = self.models[position], pack.names[0]
        dtype = self.dtype(position, first)
        theta = _sampled(_flat(model, pack), step).to(dtype)
        sign = self._sign(model, first)
        return theta + sign * _sampled(_flat(self.base, pack), step).to(dtype) if sign else theta

    def statistics(self, position: int, names: Sequence[str]) -> Statistics:
        """Return the statistics that the rule requires: the base's weights, and the task's counts."""
        known: dict[str, Mapping[str, Tensor] | float] = {
            name: count for name, count in self.models[position].counts.items() if name in self._needed
        }
        if "weights" in self._needed:
            known["weights"] = {name: self.base.tensor(name) for name in names}
        return known

    def _sign(self, model: Checkpoint, name: str) -> int:
        """Return whether the base is subtracted (-1), added (1) or neither (0)."""
        if model.is_difference(name):
            return int(self.origin == "zero")
        return -int(self.origin == "base")

    def _buffer(self, dtype: torch.dtype, numel: int) -> Tensor:
        if dtype not in self._buffers or self._buffers[dtype].numel() < numel:
            self._buffers[dtype] = torch.empty(numel, dtype=dtype)
        return self._buffers[dtype][:numel]


def check_statistics(merger: Merger, models: Sequence[Checkpoint]) -> None:
    """Refuse a rule that requires statistics that are unknown for these models.

    Args:
        merger: The rule.
        models: The models.

    Raises:
        ValueError: If the rule requires statistics other than the base's weights and counts, or a model lacks a count.
    """
    more = ["score"] * merger.requires_score + ["gradient"] * merger.requires_gradient
    if measured := [*more, *sorted(merger.requires - {"weights", *COUNTS})]:
        raise ValueError(
            f"expected a rule that needs what checkpoints hold, got {merger!r}, which also needs "
            f"{', '.join(measured)}: measured on images of the tasks. `clmerge compare RUN --mergers "
            f"{type(merger).__name__}` measures and merges for a run folder, `clmerge fit` while it trains"
        )
    for name in sorted(merger.requires & set(COUNTS)):
        if missing := [model.source for model in models if name not in model.counts]:
            raise ValueError(
                f"expected the number of {name} of every task for {merger!r}, got none in {missing[0]}; name a run "
                "folder or its bank, whose task vectors say it"
            )


def _flat(checkpoint: Checkpoint, pack: Pack, piece: slice | None = None) -> Tensor:
    """Return parameters of one kind as stored in a checkpoint, concatenated."""
    if pack.names[0] not in checkpoint.entries:  # parameters that an adapter does not target
        return torch.zeros(1).expand(pack.numel if piece is None else piece.stop - piece.start)
    return checkpoint.joined(pack.names, piece)


def _sampled(flat: Tensor, step: int) -> Tensor:
    """Return one of ``step`` entries, in runs of 16, because the time depends on the number of cache lines read."""
    period = _RUN * step
    whole = flat.numel() // period * period
    runs = flat[:whole].view(-1, period)[:, :_RUN].reshape(-1)
    return torch.cat([runs, flat[whole::step]])
