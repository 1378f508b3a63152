"""LoRA adapters as task vectors: products of two factors, computed a few rows at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.checkpoints.reader import Checkpoint, Entry
from clmerge.weights.factored import Product

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
"""Before every name in a file of PEFT."""

# Entries of a product that are computed together; the blocks, and so the bits, do not depend on the requested piece.
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one weight: ``scale * B @ A``.

    Attributes:
        a: Name of A in the file.
        b: Name of B in the file.
        turned: Whether the weight has the layout of the transposed product, as for embeddings.
        scale: Scalar factor of the product.
        gain: How many times PEFT adds the product; ``scale`` includes it.
        entry: Shape and dtype of the product in the weight's layout.
        magnitude: Name of DoRA's norms, to which the rows of the weight with the product are scaled.
    """

    a: str
    b: str
    turned: bool
    scale: float
    entry: Entry
    gain: int = 1
    magnitude: str | None = None


@dataclass(frozen=True)
class Shift:
    """What an adapter adds to one bias: ``scale`` times a stored tensor (PEFT's ``lora_bias``)."""

    stored: str
    scale: float
    entry: Entry


class AdapterCheckpoint(Checkpoint):
    """A LoRA adapter, as a task vector: ``scale * B @ A`` for every weight that it targets.

    Products have the layout of their weights. Those of DoRA, which scales the rows of the weight with the product to
    norms of its own, can be read once ``attach`` has given the base.

    Args:
        weights: The open file, by its own names.
        files: All files of the adapter.
        kind: Description of the format.
        products: The factors by the name of the weight.
        shifts: What is added to biases, by the name of the bias.
        whole: Weights that are stored whole: names in the file by names of the weights.
        config: The adapter's configuration, if the format has one.
    """

    def __init__(
        self,
        weights: Checkpoint,
        files: Sequence[Path],
        kind: str,
        *,
        products: Mapping[str, Factors],
        shifts: Mapping[str, Shift] | None = None,
        whole: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._factors = weights
        self._products = dict(products)
        self._shifts = dict(shifts or {})
        self._whole = dict(whole or {})
        self._theta: Checkpoint | None = None
        self._names: dict[str, str] = {}  # names in the base by names of the products
        self._norms: dict[str, Tensor] = {}
        self.config = dict(config or {})
        entries = {name: found.entry for name, found in self._products.items()}
        entries |= {name: shift.entry for name, shift in self._shifts.items()}
        entries |= {name: weights.entries[stored] for name, stored in self._whole.items()}
        super().__init__(Path(weights.source), kind, files, entries)
        self.is_task_vector = True
        self.rest_is_zero = True

    def products(self) -> dict[str, Product]:
        """Return the stored factors of every matrix that the adapter just adds a product to."""
        found = ((name, self.factors(name)) for name in self.entries)
        return {
            name: Product(self._factors.tensor(one.a), self._factors.tensor(one.b), one.scale)
            for name, one in found
            if one is not None and not one.turned and one.magnitude is None and len(one.entry.shape) == 2
        }

    def factors(self, name: str) -> Factors | None:
        """Return the description of what is added to a weight; None if it is stored whole, or is a bias."""
        return self._products.get(self.stored(name))

    def whole_name(self, name: str) -> str | None:
        """Return the name in the file of a weight that is stored whole; None for what is added to one."""
        return self._whole.get(self.stored(name))

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the factors, or the whole tensor, are stored."""
        stored = self.stored(name)
        found = self._products.get(stored)
        inner = found.b if found else self._shifts[stored].stored if stored in self._shifts else self._whole[stored]
        return self._factors.entries[inner].dtype

    def span(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return B and A as matrices, whose columns and rows span the product; None if there is more than a product."""
        found = self.factors(name)
        if found is None or found.magnitude is not None:
            return None
        return self._factors.tensor(found.b).flatten(1), self._factors.tensor(found.a).flatten(1)

    @override
    def attach(self, base: Checkpoint) -> None:
        self._theta = base
        self._names = {self.stored(name): name for name in self.entries if name in base.entries}
        self._norms.clear()

    @override
    def is_difference(self, name: str) -> bool:
        return self.stored(name) not in self._whole

    @override
    def _read(self, name: str) -> Tensor:
        if name in self._whole:
            return self._factors.tensor(self._whole[name])
        if name in self._shifts:
            shift = self._shifts[name]
            return self._factors.tensor(shift.stored).to(shift.entry.dtype) * shift.scale
        return self._rows(name, 0, self._products[name].entry.shape[0]).reshape(self._products[name].entry.shape)

    @override
    def _read_piece(self, name: str, piece: slice) -> Tensor:
        if name not in self._products:
            return super()._read_piece(name, piece)
        width = prod(self._products[name].entry.shape[1:])
        start, stop = int(piece.start), int(piece.stop)
        first = start // width if width else 0
        rows = self._rows(name, first, -(-stop // width) if width else 0)
        return rows.reshape(-1)[start - first * width : stop - first * width]

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        """Compute some rows of what is added to a weight."""
        found = self._products[name]
        rows, begin, end = self._product_rows(found, first, last)
        if found.magnitude is not None:
            start = self._start(name, begin, end, rows)
            norms = self._norms.get(name)
            if norms is None:
                norms = self._norms[name] = self._norms_of(name, found)
            factor = self._factors.tensor(found.magnitude).reshape(-1).to(rows.dtype) / norms
            rows = (start + rows).mul_(factor[None] if found.turned else factor[begin:end, None]).sub_(start)
        return rows[first - begin : last - begin]

    def _product_rows(self, found: Factors, first: int, last: int) -> tuple[Tensor, int, int]:
        """Compute rows of a product in whole blocks, which begin at the same rows for every request.

        Returns:
            The rows, the first of them, and the one after the last.
        """
        left, right = (self._factors.tensor(factor).flatten(1) for factor in (found.b, found.a))
        if found.turned:
            left, right = right.t(), left.t()
        left, right = left.to(found.entry.dtype), right.to(found.entry.dtype)
        height = max(1, _BLOCK // max(right.shape[1], 1))
        begin, end = first // height * height, min(-(-last // height) * height, left.shape[0])
        rows = left.new_empty(end - begin, right.shape[1])
        for row in range(begin, end, height):
            torch.mm(left[row : row + height], right, out=rows[row - begin : row - begin + height])
        return rows.mul_(found.scale), begin, end

    def _start(self, name: str, first: int, last: int, like: Tensor) -> Tensor:
        """Return rows of the base's weight, in the dtype of the product."""
        if self._theta is None or name not in self._names:
            raise ValueError(
                f"expected the base of {self.source}, whose DoRA scales the rows of {name!r} with its product, got "
                "none; name the base that the adapter was trained on"
            )
        width = like.shape[1]
        rows = self._theta.tensor(self._names[name], slice(first * width, last * width))
        return rows.reshape(-1, width).to(like.dtype)

    def _norms_of(self, name: str, found: Factors) -> Tensor:
        """Return the norms of the rows (columns, if turned) of the weight with its product."""
        height, width = found.entry.shape[0], prod(found.entry.shape[1:])
        squares = torch.zeros(width if found.turned else height, dtype=torch.float64)
        step = max(1, _BLOCK // max(width, 1))
        for first in range(0, height, step):
            rows, begin, end = self._product_rows(found, first, min(first + step, height))
            rows = (self._start(name, begin, end, rows) + rows).double().square_()
            if found.turned:
                squares += rows.sum(dim=0)
            else:
                squares[begin:end] = rows.sum(dim=1)
        return squares.sqrt_().to(found.entry.dtype)
