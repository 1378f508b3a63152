"""Matrices stored as two thin factors, which makes low-rank task vectors small on disk."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from clmerge.files import parse_json
from clmerge.weights.task_vector import State, accumulator_dtype

SCALES = "low_rank"
"""Header entry of a file that names the matrices stored as factors, with the scale of each product (JSON)."""

_A, _B = "/A", "/B"


@dataclass(frozen=True)
class Product:
    """The matrix ``scale * B A``.

    Args:
        a: A of shape ``(rank, in)``, or ``(slices, rank, in)`` for a matrix of slices stacked along the rows.
        b: B of shape ``(out, rank)``, or ``(slices, out / slices, rank)``.
        scale: Scalar factor of the product.

    Example:
        >>> import torch
        >>> Product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]]), 2.0).dense()
        tensor([[ 6., 12.],
                [ 0.,  0.]])
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        return product_shape(tuple(self.a.shape), tuple(self.b.shape))

    @property
    def numel(self) -> int:
        """Number of entries of both factors."""
        return self.a.numel() + self.b.numel()

    def dense(self) -> Tensor:
        """Return the matrix, in float32 (float64 if either factor is)."""
        dtype = accumulator_dtype(self.a, self.b)
        # Adding zero turns -0.0 into 0.0, so that equal matrices have equal bytes.
        return product(self.a.to(dtype), self.b.to(dtype), self.scale).add_(0.0)


def product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``scale * B A`` of shape ``(out, in)``, slices stacked along the rows; differentiable.

    Args:
        a: As in ``Product``.
        b: As in ``Product``.
        scale: Scalar factor of the product.
    """
    return (b @ a).mul(scale).reshape(-1, a.shape[-1])


def product_shape(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of a product from those of its factors.

    Example:
        >>> product_shape((3, 2, 8), (3, 8, 2))
        (24, 8)
    """
    return prod(b[:-1]), a[-1]


def factored(tau: State, factors: Mapping[str, Product]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Replace matrices of a task vector by factors, if these are smaller and their product is bitwise equal.

    Args:
        tau: The task vector.
        factors: Factors of some of its matrices.

    Returns:
        Tensors to write, and the matching header entries; ``TensorFile`` reads both.
    """
    tensors: dict[str, Tensor] = {}
    scales = {}
    for name, tensor in tau.items():
        found = factors.get(name)
        if found is None or found.numel >= tensor.numel() or not _same(found.dense(), tensor):
            tensors[name] = tensor
            continue
        tensors |= {name + _A: found.a, name + _B: found.b}
        scales[name] = found.scale
    return tensors, {SCALES: json.dumps(scales)} if scales else {}


def factor_names(
    metadata: Mapping[str, str], shapes: Callable[[str], tuple[int, ...] | None], source: str
) -> dict[str, tuple[str, str, float]]:
    """Return the factors listed in a file's header: matrix name -> names of A and B, and the scale.

    Args:
        metadata: The header's strings.
        shapes: Returns the shape of a stored tensor, or None if there is no tensor with that name.
        source: The file, for messages.

    Raises:
        ValueError: If the entry is malformed, or factors are missing or their shapes do not match.
    """
    if SCALES not in metadata:
        return {}
    where = f"{source}, under {SCALES!r} in its header"
    scales = parse_json(metadata[SCALES], where)
    if not isinstance(scales, dict):
        raise ValueError(f"expected a factor for every product in {where}, got {type(scales).__name__}")
    found = {}
    for name, scale in scales.items():
        a, b = (shapes(name + end) for end in (_A, _B))
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ValueError(f"expected a number for {name!r} in {where}, got {str(scale)[:40]}")
        if a is None or b is None or shapes(name) is not None:
            raise ValueError(
                f"expected {name + _A!r} and {name + _B!r} in place of {name!r} in {source}, got other tensors"
            )
        if len(a) not in (2, 3) or len(a) != len(b) or a[:-2] != b[:-2] or a[-2] != b[-1] or not a[-2]:
            raise ValueError(f"expected factors of {name!r} that can be multiplied in {source}, got {b} and {a}")
        found[name] = (name + _A, name + _B, float(scale))
    return found


class TensorFile:
    """A safetensors file whose matrices may be stored as factors; tensors are read on access.

    Args:
        path: The file.

    Raises:
        ValueError: If it is not a safetensors file, or its header does not match its factors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        opened: Any = safe_open
        try:
            self._file = opened(os.fspath(path), framework="pt", device="cpu")
        except SafetensorError as error:
            raise ValueError(f"expected a whole safetensors file, got {os.fspath(path)}: {error}") from error
        self.metadata: dict[str, str] = dict(self._file.metadata() or {})
        stored = set(self._file.keys())
        self._factors = factor_names(
            self.metadata, lambda name: self._stored_shape(name) if name in stored else None, os.fspath(path)
        )

    def names(self) -> list[str]:
        """Return the names of all tensors; a factored matrix has its own name, its factors are not listed."""
        inner = {name for a, b, _ in self._factors.values() for name in (a, b)}
        return sorted([*(name for name in self._file.keys() if name not in inner), *self._factors])  # noqa: SIM118

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        if name in self._factors:
            a, b, _ = self._factors[name]
            return product_shape(self.shape(a), self.shape(b))
        return self._stored_shape(name)

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """Read a tensor; unless it is stored as factors, the result is a view of the file."""
        if name in self._factors:
            a, b, scale = self._factors[name]
            return Product(self.read(a), self.read(b), scale).dense()
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)


def _same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and bool((left == right.to(left.device)).all())
