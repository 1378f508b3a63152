"""Merge task vectors that are on disk, a few parameters at a time: memory does not grow with the number of tasks."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots, slot_blocks
from clmerge.merging.checks import Shapes, is_finite, num_entries
from clmerge.merging.merger import Merger
from clmerge.merging.pipeline import Pipeline
from clmerge.merging.scope import widest
from clmerge.merging.sign.ties import TIES, sum_of_signs
from clmerge.merging.sparsify.sparsifier import TrimModel
from clmerge.merging.threshold import kth_of_pieces, sample_step
from clmerge.merging.vectors import Pack, Vectors, packs
from clmerge.weights.task_vector import LazyVector, State

_PIECE = 1 << 20

Passes = Literal["entry", "parameter", "thresholds", "model"]
"""How a rule is streamed: in pieces, parameter by parameter, in pieces after a pass for thresholds, or as a whole."""


def passes_of(merger: Merger) -> Passes:
    """Return how a rule can be streamed.

    Example:
        >>> from clmerge.merging import GreedySoup, MagMax
        >>> passes_of(MagMax()), passes_of(TIES()), passes_of(GreedySoup())
        ('entry', 'thresholds', 'model')
    """
    if merger.scope != "model":
        return merger.scope
    if type(merger) is TIES:
        return "thresholds"
    if not isinstance(merger, Pipeline) or type(merger.sparsifier) is not TrimModel:
        return "model"
    return "thresholds" if widest(merger._inner, merger.finisher) == "parameter" else "model"


def working_memory(merger: Merger, shapes: Shapes, num_tasks: int) -> int:
    """Estimate the bytes that merging takes at its peak, for float32.

    Args:
        merger: The rule.
        shapes: Shapes of the parameters by name.
        num_tasks: How many task vectors are merged.
    """
    held = packs(shapes, lambda name: None)
    largest = max((pack.numel for pack in held), default=0)
    whole = passes_of(merger) == "model"
    numel = num_entries(shapes) if whole else largest
    # One pack each of a task vector, the merged vector (two while a sign is undecided) and the merged model.
    buffers = 8 * numel + 8 * largest
    if merger.keeps_vectors and whole:
        return merger.reading_bytes * numel + 4 * num_tasks * largest + buffers
    parts = [shapes] if whole else [pack.shapes for pack in held]
    return max((merger.state_size(part, num_tasks) for part in parts), default=0) + buffers


def merge_out_of_core(merger: Merger, vectors: Vectors) -> Iterator[tuple[Pack, Tensor]]:
    """Merge task vectors parameter by parameter; the result is bitwise that of merging them in memory.

    Small parameters are merged together, so that the cost depends on the number of entries, not of parameters.

    Rules with one threshold for the whole model (TIES by default, a pipeline with ``TrimModel``) read everything
    twice. Any other rule whose ``scope`` is ``"model"`` holds its state, one task vector and the result in memory; a
    rule that keeps every task vector reads the vectors again instead.

    Args:
        merger: The rule and its settings; its own state is neither used nor changed.
        vectors: The task vectors.

    Yields:
        Packs of parameters and their merged entries, flat and concatenated, scale included. A pack that is yielded a
        second time replaces the first.

    Raises:
        ValueError: If ``vectors`` lacks a statistic that the rule requires, or a vector is invalid; see
            ``Merger.update``.
        RuntimeError: If the merged vector overflows.
    """
    merger = deepcopy(merger)
    merger.reset()
    packed = packs(vectors.shapes, vectors.kind)
    match passes_of(merger):
        case "model":
            yield from _whole(merger, vectors, packed)
        case "parameter":
            yield from _by_parameter(merger, vectors, packed)
        case "entry":
            yield from _by_entry(merger, vectors, packed)
        case "thresholds":
            density = _trim_density(merger)
            found = (_threshold(density, vectors, position, packed) for position in range(len(vectors.tasks)))
            thresholds = dict(zip(vectors.tasks, found, strict=True))
            if isinstance(merger, TIES):
                merger._sparsifier = _KnownThresholds(merger.density, thresholds)
                with torch.inference_mode(False), torch.no_grad():
                    yield from _ties(merger, vectors, packed)
            elif isinstance(merger, Pipeline):
                merger.sparsifier = _KnownThresholds(_trim_density(merger), thresholds)
                merger._sparsify_with([])
                yield from _by_parameter(merger, vectors, packed)


class _KnownThresholds(TrimModel):
    """Trim with known thresholds, by task."""

    def __init__(self, density: float, thresholds: dict[int, float]) -> None:
        super().__init__(density)
        self.thresholds = thresholds

    @override
    def plan(self, vector: State, task: int) -> float:
        return self.thresholds[task]


class _Flat:
    """The entries of one task vector, read anew at every iteration."""

    def __init__(self, vectors: Vectors, position: int, packed: list[Pack]) -> None:
        self.vectors, self.position, self.packed = vectors, position, packed

    def __iter__(self) -> Iterator[Tensor]:
        for pack in self.packed:
            for piece in _pieces(pack.numel):
                yield self.vectors.read(self.position, pack, piece)


def _trim_density(merger: Merger) -> float:
    trim = merger.sparsifier if isinstance(merger, Pipeline) else merger
    if not isinstance(trim, TrimModel | TIES):
        raise TypeError(f"expected a rule that trims, got {merger!r}")
    return trim.density


def _threshold(density: float, vectors: Vectors, position: int, packed: list[Pack]) -> float:
    """Compute the threshold of ``TrimModel.plan`` without holding the task vector in memory."""
    total = sum(pack.numel for pack in packed)
    count = int(density * total) + 1
    if count > total:
        return 0.0
    wide = any(vectors.dtype(position, pack.names[0]) == torch.float64 for pack in packed)
    step = sample_step(total)
    sample = [vectors.sample(position, pack, step) for pack in packed]
    entries = _Flat(vectors, position, packed)
    return kth_of_pieces(entries, sample, torch.float64 if wide else torch.float32, total, count).value


def _pieces(numel: int) -> list[slice]:
    """Split a parameter into pieces whose accumulators stay in the processor's cache over all tasks."""
    return [slice(start, min(start + _PIECE, numel)) for start in range(0, max(numel, 1), _PIECE)]


def _by_piece(pack: Pack, merged: Callable[[Pack, slice], Tensor]) -> Tensor:
    """Merge a pack piece by piece."""
    whole: Tensor | None = None
    for piece in _pieces(pack.numel):
        part = merged(pack, piece)
        if whole is None:
            whole = part.new_empty(pack.numel)
        whole[piece] = part
    assert whole is not None, "an empty parameter has one piece"
    return whole


def _as_one(pack: Pack, merged: Callable[[Pack, slice], Tensor]) -> Tensor:
    """Merge a pack as if it were one parameter; equivalent for a rule that works entry by entry."""
    try:
        return _by_piece(pack, merged)
    except (ValueError, RuntimeError):
        if len(pack.shapes) == 1:
            raise
    # What is wrong with one of them can be said by name.
    return torch.cat([_by_piece(Pack({name: shape}), merged) for name, shape in pack.shapes.items()])


def _fold_as_one(merger: Merger, vectors: Vectors, pack: Pack, piece: slice) -> None:
    merger.reset()
    for position, task in enumerate(vectors.tasks):
        known = vectors.statistics(position, pack.names)
        merger.update_piece({pack.names[0]: vectors.read(position, pack, piece)}, task, statistics=known)


def _joined(found: dict[str, Tensor], pack: Pack) -> Tensor:
    """Remove the parameters of a pack from ``found`` and return them concatenated."""
    parts = [found.pop(name).reshape(-1) for name in pack.names]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _by_entry(merger: Merger, vectors: Vectors, packed: list[Pack]) -> Iterator[tuple[Pack, Tensor]]:
    def merged(pack: Pack, piece: slice) -> Tensor:
        _fold_as_one(merger, vectors, pack, piece)
        return merger.compute()[pack.names[0]]

    for pack in packed:
        yield pack, _as_one(pack, merged)
    merger.reset()


def _by_parameter(merger: Merger, vectors: Vectors, packed: list[Pack]) -> Iterator[tuple[Pack, Tensor]]:
    for pack in packed:
        merger.reset()
        for position, task in enumerate(vectors.tasks):
            known = vectors.statistics(position, pack.names)
            merger.update_piece(pack.parts(vectors.read(position, pack)), task, statistics=known)
        yield pack, _joined(merger.compute(), pack)
    merger.reset()


class _Reread(LazyVector):
    """One of the task vectors, for rules that keep them all; a parameter is read again at every access."""

    def __init__(self, vectors: Vectors, position: int) -> None:
        self._vectors = vectors
        self._position = position

    @override
    def names(self) -> Sequence[str]:
        return list(self._vectors.shapes)

    @override
    def __getitem__(self, name: str) -> Tensor:
        shape = self._vectors.shapes[name]
        return self._vectors.read(self._position, Pack({name: shape})).view(shape).clone()


def _whole(merger: Merger, vectors: Vectors, packed: list[Pack]) -> Iterator[tuple[Pack, Tensor]]:
    for position, task in enumerate(vectors.tasks):
        vector = _Reread(vectors, position)
        known = vectors.statistics(position, list(vectors.shapes))
        merger.update(vector if merger.keeps_vectors else dict(vector), task=task, statistics=known)
    found = merger.compute()
    for pack in packed:
        yield pack, _joined(found, pack)


def _ties(merger: TIES, vectors: Vectors, packed: list[Pack]) -> Iterator[tuple[Pack, Tensor]]:
    """Merge by TIES with one trim for the model.

    Entries whose sum is zero take the majority sign over the entries of the model, which is known only at the end.
    Parameters that depend on it are merged with a guess first, and again if the guess was wrong.
    """
    surplus = 0
    guesses: dict[str, int] = {}  # by the first name of a pack

    def elected() -> int:
        # Without a majority, only the largest magnitude is another than with a negative one.
        return 1 if surplus > 0 else 0 if merger.merge == "max" and not surplus else -1

    def merged(pack: Pack, piece: slice, sign: int) -> Tensor:
        nonlocal surplus
        first = pack.names[0]
        _fold_as_one(merger, vectors, pack, piece)
        for block, _ in slot_blocks(merger._slots[first]):
            total = merger._total(block)
            surplus += sum_of_signs([total])
            if first not in guesses and _undecided(block, total):
                guesses[first] = sign
        return _read(merger, first, sign)

    for pack in packed:
        yield pack, _as_one(pack, partial(merged, sign=elected()))
    sign = elected()
    for pack in packed:
        if guesses.get(pack.names[0], sign) != sign:
            yield pack, _as_one(pack, partial(merged, sign=sign))
    merger.reset()


def _undecided(block: Slots, total: Tensor) -> bool:
    """Return whether any entry depends on the sign chosen for zero sums: its positive and negative parts differ."""
    kind = "max" if "pos_max" in block else "sum"
    # Numbers instead of booleans: on a CPU comparisons that return booleans, and any(), take five times as long.
    zero = torch.eq(total, 0, out=torch.empty_like(total))
    differ = torch.ne(block[f"pos_{kind}"], block[f"neg_{kind}"], out=torch.empty_like(total))
    return bool(zero.dot(differ))


def _read(merger: TIES, name: str, sign: int) -> Tensor:
    merged = merger._read(name, merger._slots[name], sign)
    if not is_finite(merged):
        raise RuntimeError(f"expected finite sums, got an overflow in {name!r} of {merger!r}; scale it down")
    return merged
