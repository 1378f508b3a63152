"""Class heads and vocabularies of different size: a named policy for what the merged model has of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.checkpoints.policy import Treatment
from clmerge.checkpoints.reader import Checkpoint, Entry, Stand
from clmerge.checkpoints.rows import row_names
from clmerge.weights.task_vector import accumulator_dtype

Heads = Literal["base", "union", "first", "drop"]
"""What becomes of tensors whose first side differs between base and models."""


@dataclass
class SettledHeads:
    """What a policy decided.

    Attributes:
        treatments: Treatment of tensors that are not merged, by name.
        notes: Notes for the user, one per line.
        classes: The names of the rows of a union by class names.
    """

    treatments: dict[str, Treatment] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)


def settle_heads(
    base: Checkpoint, models: Sequence[Checkpoint], heads: Heads | None, is_wanted: Callable[[str], bool]
) -> SettledHeads:
    """Decide what becomes of class heads and vocabularies of different size.

    These are weights whose shapes differ between base and models in the first side alone. ``"union"`` and ``"first"``
    also take in those that the base lacks.

    - ``"base"`` keeps the base's (``Policy`` says so of every tensor of another shape).
    - ``"first"`` takes the whole tensor of the first model that has it.
    - ``"drop"`` leaves the tensors out of the result.
    - ``"union"`` has a row for every class or token that the base or a model names. Rows that the base has are merged
      by the rule, with no change by models that lack them; others are the mean over the models that have them.

    Args:
        base: The base model; changed in place, as the models are.
        models: The models, with the base's names.
        heads: The policy; default the base's, with a note where another might be meant.
        is_wanted: Returns, by name, whether a tensor is to be merged.

    Raises:
        ValueError: If a union lacks the names of rows.
    """
    if heads is not None and heads not in get_args(Heads):
        raise ValueError(f"expected --heads of {', '.join(get_args(Heads))}, got {heads!r}")
    found = SettledHeads()
    names = dict.fromkeys(name for one in (base, *models) for name in one.entries)
    for name in filter(is_wanted, names):
        holders = [one for one in models if name in one.entries and not one.is_difference(name)]
        if not holders or not all(one.entries[name].dtype.is_floating_point for one in holders):
            continue
        present = [base, *holders] if name in base.entries else holders
        if not _is_head(name, base, present):
            continue
        match heads or "base":
            case "base":
                if heads is None and name in base.entries:
                    found.notes.append(f"heads   {_shapes(name, present)}: the base's is kept; see --heads")
            case "first":
                base.put(name, holders[0].hold(name))
                detail = f"{holders[0].entries[name].shape} of {holders[0].source}"
                found.treatments[name] = ("taken", "of the first model that has it", detail, False)
            case "drop":
                if name in base.entries:
                    found.notes.append(f"dropped {_shapes(name, present)}")
                for one in (base, *models):
                    one.remove(name)
            case "union":
                _unite(name, base, models, present, found)
    found.notes += _other_classes(models, [name for name in names if name not in found.treatments and is_wanted(name)])
    return found


def _other_classes(models: Sequence[Checkpoint], names: Sequence[str]) -> list[str]:
    """Note weights with a row for every class of models that name as many, but other, classes."""
    named = [one for one in models if one.classes]
    if len({tuple(one.classes) for one in named}) < 2:
        return []
    number = len(named[0].classes)
    rows = [
        name
        for name in names
        if all(name in one.entries and one.entries[name].shape[:1] == (number,) == (len(one.classes),) for one in named)
    ]
    if not rows:
        return []
    other = next(one for one in named if one.classes != named[0].classes)
    return [
        f"classes differ: {named[0].source} and {other.source} name {number} classes each, not the same ones in the "
        f"same order; rows of {', '.join(map(repr, rows[:3]))} are merged by position"
    ]


def _is_head(name: str, base: Checkpoint, present: Sequence[Checkpoint]) -> bool:
    shapes = {one.entries[name].shape for one in present}
    if name not in base.entries:
        return all(shapes) and len({shape[1:] for shape in shapes}) == 1
    return len(shapes) > 1 and all(shapes) and len({shape[1:] for shape in shapes}) == 1


def _unite(
    name: str, base: Checkpoint, models: Sequence[Checkpoint], present: Sequence[Checkpoint], found: SettledHeads
) -> None:
    known = {id(one): row_names(one, one.entries[name].shape[0]) for one in present}
    holders = [one for one in present if one is not base]
    if unnamed := [one for one in holders if not known[id(one)]]:
        if name not in base.entries:
            return  # not a head with names: it stays what only models have
        raise ValueError(
            f"expected names of classes or tokens for the rows of {_shapes(name, present)}, got none in "
            f"{unnamed[0].source}; add them (classes as a list in the file, id2label in config.json, a tokenizer), or "
            "choose --heads first, drop or base"
        )
    own = known.get(id(base), [])
    rows = list(dict.fromkeys([*own, *(row for one in holders for row in known[id(one)])]))
    rows_of_base = (
        f"{len(own)} of them the base's"
        if own
        else "without the base's"
        if name in base.entries
        else "none in the base"
    )
    found.notes.append(f"union   {_shapes(name, present)}: {len(rows)} rows by name, {rows_of_base}")
    if all(known[id(one)] in ([], one.classes) for one in present):
        found.classes = rows
    shape = (len(rows), *present[0].entries[name].shape[1:])
    dtypes = [one.entries[name].dtype for one in ([base] if name in base.entries else holders)]
    dtype = reduce(torch.promote_types, dtypes)
    sources = {id(one): _Source(one.hold(name), _places(rows, known[id(one)])) for one in present if known[id(one)]}
    total = _Union(Entry(shape, dtype), sources.get(id(base)), [sources[id(one)] for one in holders])
    base.put(name, total)
    for model in models:
        if id(model) in sources:
            model.put(name, _Part(total, sources[id(model)]))
        elif not model.is_task_vector:  # no row of the model: no change
            model.put(name, total)


def _shapes(name: str, present: Sequence[Checkpoint]) -> str:
    """Return the name of a tensor with its shape in every file, the same ones once."""
    first: dict[tuple[int, ...], str] = {}
    for one in present:
        first.setdefault(one.entries[name].shape, one.source)
    return f"{name!r} ({', '.join(f'{shape} in {source}' for shape, source in first.items())})"


def _places(rows: Sequence[str], names: Sequence[str]) -> Tensor:
    """Return for every row of the union its index among ``names``, -1 if it is not there."""
    places = {name: index for index, name in enumerate(names)}
    return torch.tensor([places.get(row, -1) for row in rows])


@dataclass(frozen=True)
class _Source:
    """A tensor, and for every row of the union its row there (-1 if it has none)."""

    tensor: Stand
    places: Tensor

    def rows(self, wanted: Tensor) -> Tensor:
        """Return some rows by their places, as a matrix."""
        return self.tensor.read().reshape(self.tensor.entry.shape[0], -1)[wanted]


class _OfRows(Stand, ABC):
    """A tensor that is computed some rows at a time."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    @abstractmethod
    def rows(self, first: int, last: int) -> Tensor:
        """Return rows as a matrix."""

    @override
    def read(self, piece: slice | None = None) -> Tensor:
        if piece is None:
            return self.rows(0, self.entry.shape[0]).reshape(self.entry.shape)
        start, stop, _ = piece.indices(self.entry.numel)
        width = prod(self.entry.shape[1:])
        first = start // width
        flat = self.rows(first, max(first, -(-stop // width))).reshape(-1)
        return flat[start - first * width : stop - first * width]


class _Union(_OfRows):
    """The base's rows, and the mean over the models of those that it lacks."""

    def __init__(self, entry: Entry, base: _Source | None, models: Sequence[_Source]) -> None:
        super().__init__(entry)
        self._base = base
        self._models = models
        self.is_new = torch.ones(entry.shape[0], dtype=torch.bool) if base is None else base.places < 0

    @override
    def rows(self, first: int, last: int) -> Tensor:
        count, width = last - first, prod(self.entry.shape[1:])
        found = torch.zeros(count, width, dtype=self.entry.dtype)
        new = self.is_new[first:last]
        if self._base is not None and not new.all():
            found[~new] = self._base.rows(self._base.places[first:last][~new]).to(found.dtype)
        if new.any():
            total = torch.zeros(count, width, dtype=accumulator_dtype(found))
            number = torch.zeros(count, 1, dtype=total.dtype)
            for source in self._models:
                places = source.places[first:last]
                has = new & (places >= 0)
                total[has] += source.rows(places[has]).to(total.dtype)
                number[has] += 1
            found[new] = (total[new] / number[new]).to(found.dtype)
        return found


class _Part(_OfRows):
    """The rows of a model where the base has them, too, else those of the union."""

    def __init__(self, total: _Union, source: _Source) -> None:
        dtype = torch.promote_types(total.entry.dtype, source.tensor.entry.dtype)
        super().__init__(Entry(total.entry.shape, dtype))
        self._total = total
        self._source = source

    @override
    def rows(self, first: int, last: int) -> Tensor:
        found = self._total.rows(first, last).to(self.entry.dtype)
        places = self._source.places[first:last]
        has = (places >= 0) & ~self._total.is_new[first:last]
        found[has] = self._source.rows(places[has]).to(found.dtype)
        return found
