"""Merge task vectors that are on disk, one parameter at a time: memory does not grow with the number of tasks."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from math import prod
from typing import Literal, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots, slot_blocks
from clmerge.merging.checks import Shapes, is_finite, num_entries
from clmerge.merging.merger import Merger
from clmerge.merging.pipeline import Pipeline
from clmerge.merging.scope import widest
from clmerge.merging.sparsify import TrimModel
from clmerge.merging.step import Statistics
from clmerge.merging.threshold import kth_of_pieces, sample_step
from clmerge.merging.ties import TIES, sum_of_signs
from clmerge.weights.task_vector import LazyVector, State

_PIECE = 1 << 20

Passes = Literal["entry", "parameter", "thresholds", "model"]
"""How a rule is streamed: in pieces, parameter by parameter, in pieces after a pass for thresholds, or as a whole."""


class Vectors(Protocol):
    """Task vectors that are read one parameter at a time.

    Attributes:
        names: The parameters, in the order in which they are best read.
        num_tasks: How many task vectors there are.
    """

    names: Sequence[str]
    num_tasks: int

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""

    def dtype(self, task: int, name: str) -> torch.dtype:
        """Return the dtype that ``read`` gives: float32 or float64."""

    def read(self, task: int, name: str, piece: slice | None = None) -> Tensor:
        """Return one parameter of one task vector, or a flat piece of it; the next call may overwrite it."""

    def sample(self, task: int, name: str, step: int) -> Tensor:
        """Return one of ``step`` entries of what ``read`` gives, flat and spread evenly."""

    def statistics(self, task: int, names: Sequence[str]) -> Statistics:
        """Return what is known beside a task vector, of some parameters; ``check_statistics`` says what must be."""


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
    largest = max((prod(shape) for shape in shapes.values()), default=0)
    whole = passes_of(merger) == "model"
    numel = num_entries(shapes) if whole else largest
    # One parameter of a task vector, of the merged vector (twice while a sign is undecided) and of the merged model.
    buffers = 8 * numel + 8 * largest
    if merger.keeps_vectors and whole:
        return merger.reading_bytes * numel + 4 * num_tasks * largest + buffers
    held = [shapes] if whole else [{name: shape} for name, shape in shapes.items()]
    return max((merger.state_size(part, num_tasks) for part in held), default=0) + buffers


def merge_out_of_core(merger: Merger, vectors: Vectors) -> Iterator[tuple[str, Tensor]]:
    """Merge task vectors parameter by parameter, with the bits that merging them in memory gives.

    Rules with one threshold for the whole model (TIES by default, a pipeline with ``TrimModel``) read everything
    twice. Any other rule whose ``scope`` is ``"model"`` holds its state, one task vector and the result in memory; one
    that keeps every task vector reads them again instead.

    Args:
        merger: The rule and its settings; its own state is neither used nor changed.
        vectors: The task vectors; the number of each is its task index.

    Yields:
        Names and merged parameters, scale included. A name may come a second time; then the later one counts.

    Raises:
        ValueError: If the rule needs what ``vectors`` does not know, or a vector is refused; see ``Merger.update``.
        RuntimeError: If the merged vector overflows.
    """
    merger = deepcopy(merger)
    merger.reset()
    match passes_of(merger):
        case "model":
            yield from _whole(merger, vectors)
        case "parameter":
            yield from _by_parameter(merger, vectors)
        case "entry":
            yield from _by_entry(merger, vectors)
        case "thresholds":
            thresholds = [_threshold(_trim_density(merger), vectors, task) for task in range(vectors.num_tasks)]
            if isinstance(merger, TIES):
                merger._sparsifier = _KnownThresholds(merger.density, thresholds)
                with torch.inference_mode(False), torch.no_grad():
                    yield from _ties(merger, vectors)
            elif isinstance(merger, Pipeline):
                merger.sparsifier = _KnownThresholds(_trim_density(merger), thresholds)
                merger._sparsify_with([])
                yield from _by_parameter(merger, vectors)


class _KnownThresholds(TrimModel):
    """Trim with thresholds that were found before, by task."""

    def __init__(self, density: float, thresholds: list[float]) -> None:
        super().__init__(density)
        self.thresholds = thresholds

    @override
    def plan(self, vector: State, task: int) -> float:
        return self.thresholds[task]


class _Flat:
    """The parameters of one task vector, flat, read anew at every walk."""

    def __init__(self, vectors: Vectors, task: int) -> None:
        self.vectors = vectors
        self.task = task

    def __iter__(self) -> Iterator[Tensor]:
        for name in self.vectors.names:
            for piece in _pieces(self.vectors.shape(name)):
                yield self.vectors.read(self.task, name, piece)


def _trim_density(merger: Merger) -> float:
    trim = merger.sparsifier if isinstance(merger, Pipeline) else merger
    if not isinstance(trim, TrimModel | TIES):
        raise TypeError(f"expected a rule that trims, got {merger!r}")
    return trim.density


def _threshold(density: float, vectors: Vectors, task: int) -> float:
    """Find what ``TrimModel.plan`` finds, without holding the task vector."""
    total = sum(prod(vectors.shape(name)) for name in vectors.names)
    count = int(density * total) + 1
    if count > total:
        return 0.0
    wide = any(vectors.dtype(task, name) == torch.float64 for name in vectors.names)
    step = sample_step(total)
    sample = [vectors.sample(task, name, step) for name in vectors.names]
    return kth_of_pieces(_Flat(vectors, task), sample, torch.float64 if wide else torch.float32, total, count).value


def _fold(merger: Merger, vectors: Vectors, name: str, piece: slice | None = None) -> None:
    merger.reset()
    for task in range(vectors.num_tasks):
        known = vectors.statistics(task, [name])
        merger.update_piece({name: vectors.read(task, name, piece)}, task, statistics=known)


def _pieces(shape: tuple[int, ...]) -> list[slice]:
    """Cut a parameter into pieces whose accumulators stay in the processor's cache over all tasks."""
    numel = prod(shape)
    return [slice(start, min(start + _PIECE, numel)) for start in range(0, max(numel, 1), _PIECE)]


def _by_piece(vectors: Vectors, name: str, merged: Callable[[slice], Tensor]) -> Tensor:
    """Merge a parameter piece by piece."""
    shape = vectors.shape(name)
    whole: Tensor | None = None
    for piece in _pieces(shape):
        part = merged(piece)
        if whole is None:
            whole = part.new_empty(prod(shape))
        whole[piece] = part
    assert whole is not None, "an empty parameter has one piece"
    return whole.view(shape)


def _by_entry(merger: Merger, vectors: Vectors) -> Iterator[tuple[str, Tensor]]:
    for name in vectors.names:

        def merged(piece: slice, name: str = name) -> Tensor:
            _fold(merger, vectors, name, piece)
            return merger.compute()[name]

        yield name, _by_piece(vectors, name, merged)
    merger.reset()


def _by_parameter(merger: Merger, vectors: Vectors) -> Iterator[tuple[str, Tensor]]:
    for name in vectors.names:
        _fold(merger, vectors, name)
        yield name, merger.compute()[name]
    merger.reset()


class _Reread(LazyVector):
    """One of the task vectors, for rules that keep them all: read again whenever a parameter is asked for."""

    def __init__(self, vectors: Vectors, task: int) -> None:
        self._vectors = vectors
        self._task = task

    @override
    def names(self) -> Sequence[str]:
        return self._vectors.names

    @override
    def __getitem__(self, name: str) -> Tensor:
        return self._vectors.read(self._task, name).clone()


def _whole(merger: Merger, vectors: Vectors) -> Iterator[tuple[str, Tensor]]:
    for task in range(vectors.num_tasks):
        vector = _Reread(vectors, task)
        known = vectors.statistics(task, vectors.names)
        merger.update(vector if merger.keeps_vectors else dict(vector), task=task, statistics=known)
    yield from merger.compute().items()


def _ties(merger: TIES, vectors: Vectors) -> Iterator[tuple[str, Tensor]]:
    """Merge by TIES with one trim for the model.

    Entries whose sum is zero take the sign that most entries of the model have, which is known only at the end. Where
    it would make a difference a guess is written first, and the parameter is merged again if it was wrong.
    """
    surplus = 0
    guesses: dict[str, int] = {}

    def elected() -> int:
        # Without a majority, only the largest magnitude is another than with a negative one.
        return 1 if surplus > 0 else 0 if merger.merge == "max" and not surplus else -1

    def merged(name: str, piece: slice, sign: int) -> Tensor:
        nonlocal surplus
        _fold(merger, vectors, name, piece)
        for block, _ in slot_blocks(merger._slots[name]):
            total = merger._total(block)
            surplus += sum_of_signs([total])
            if name not in guesses and _undecided(block, total):
                guesses[name] = sign
        return _read(merger, name, sign)

    for name in vectors.names:
        yield name, _by_piece(vectors, name, partial(merged, name, sign=elected()))
    sign = elected()
    for name in [name for name, guess in guesses.items() if guess != sign]:
        yield name, _by_piece(vectors, name, partial(merged, name, sign=sign))
    merger.reset()


def _undecided(block: Slots, total: Tensor) -> bool:
    """Return whether any entry depends on the sign that zero sums take: its positive and negative parts differ."""
    kind = "max" if "pos_max" in block else "sum"
    # Numbers instead of flags: on a CPU comparisons that give flags, and any(), take five times as long.
    zero = torch.eq(total, 0, out=torch.empty_like(total))
    differ = torch.ne(block[f"pos_{kind}"], block[f"neg_{kind}"], out=torch.empty_like(total))
    return bool(zero.dot(differ))


def _read(merger: TIES, name: str, sign: int) -> Tensor:
    merged = merger._read(name, merger._slots[name], sign)
    if not is_finite(merged):
        raise RuntimeError(f"expected finite sums, got an overflow in {name!r} of {merger!r}; scale it down")
    return merged
