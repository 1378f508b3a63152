"""Merge task vectors that are on disk, a few parameters at a time: memory does not grow with the number of tasks."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.checks import Shapes, num_entries
from clmerge.merging.merger import Merger
from clmerge.merging.scope import Tally
from clmerge.merging.threshold import kth_of_pieces, sample_step
from clmerge.merging.vectors import Pack, Vectors, packs
from clmerge.weights.task_vector import LazyVector

_PIECE = 1 << 20


def working_memory(merger: Merger, shapes: Shapes, num_tasks: int) -> int:
    """Estimate the bytes that merging takes at its peak, for float32.

    Args:
        merger: The rule.
        shapes: Shapes of the parameters by name.
        num_tasks: How many task vectors are merged.
    """
    held = packs(shapes, lambda name: None)
    largest = max((pack.numel for pack in held), default=0)
    whole = merger.scope == "model"
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

    For rules whose ``scope`` is ``"thresholds"`` (TIES by default, a pipeline with ``TrimModel``) everything is read
    twice. A rule whose ``scope`` is ``"model"`` holds its state, one task vector and the result in memory; a rule that
    keeps every task vector reads the vectors again instead.

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
    if merger.scope == "thresholds":
        found = (_threshold(merger, vectors, position, packed) for position in range(len(vectors.tasks)))
        merger = merger.with_thresholds(dict(zip(vectors.tasks, found, strict=True)))
    merge = {"entry": _by_entry, "parameter": _by_parameter}.get(merger.scope, _whole)
    yield from merge(merger, vectors, packed)


class _Flat:
    """The entries of one task vector, read anew at every iteration."""

    def __init__(self, vectors: Vectors, position: int, packed: list[Pack]) -> None:
        self.vectors, self.position, self.packed = vectors, position, packed

    def __iter__(self) -> Iterator[Tensor]:
        for pack in self.packed:
            for piece in _pieces(pack.numel):
                yield self.vectors.read(self.position, pack, piece)


def _threshold(merger: Merger, vectors: Vectors, position: int, packed: list[Pack]) -> float:
    """Return the magnitude that the rule needs of a task vector, without holding the vector in memory."""
    total = sum(pack.numel for pack in packed)
    count = merger.threshold_rank(total)
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
    """Merge entry by entry.

    Entries may depend on the sum of the tallies of the model, which is known only at the end. Packs that do are merged
    with a guess first, and again if the guess was wrong.
    """
    votes = 0
    guesses: dict[str, Any] = {}  # by the first name of a pack

    def merged(pack: Pack, piece: slice, decision: Any, found: list[Tally]) -> Tensor:
        _fold_as_one(merger, vectors, pack, piece)
        found.append(merger.tally())
        return merger.compute_decided(decision)[pack.names[0]]

    for pack in packed:
        guess, found = merger.decide(votes), list[Tally]()
        yield pack, _as_one(pack, partial(merged, decision=guess, found=found))
        votes += sum(tally.votes for tally in found)
        if any(tally.is_open for tally in found):
            guesses[pack.names[0]] = guess
    decision = merger.decide(votes)
    for pack in packed:
        if guesses.get(pack.names[0], decision) != decision:
            yield pack, _as_one(pack, partial(merged, decision=decision, found=[]))
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
