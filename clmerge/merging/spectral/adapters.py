"""Merging of low-rank adapters, where the result is again a pair of thin factors per weight."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clmerge.weights.factored import Product
from clmerge.weights.task_vector import State, accumulator_dtype

Adapter = Mapping[str, Product]
"""Factors by the name of the weight that their product is added to."""


def sum_adapters(adapters: Sequence[Adapter], coefficients: Sequence[float] | None = None) -> dict[str, Product]:
    """Add adapters exactly, by concatenating their factors: task arithmetic; the ranks add up.

    Args:
        adapters: At least one; ranks and scales may differ. An adapter does not change weights that it lacks.
        coefficients: One per adapter; default 1 for all.

    Returns:
        An adapter of scale 1.

    Raises:
        ValueError: If there is no adapter, the number of coefficients differs, or shapes of a weight differ.

    Example:
        >>> one = {"w": Product(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [1.0]]), 2.0)}
        >>> two = {"w": Product(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0], [0.0]]), 1.0)}
        >>> sum_adapters([one, two], [0.5, 3.0])["w"].dense()
        tensor([[1., 3.],
                [1., 0.]])
    """
    weights = [1.0] * len(adapters) if coefficients is None else list(coefficients)
    if not adapters or len(weights) != len(adapters):
        raise ValueError(f"expected one coefficient for every adapter, got {len(weights)} for {len(adapters)}")
    merged = {}
    for name, found in _by_weight(adapters).items():
        slices = max(part.a.ndim for _, part in found)
        pairs = [(_sliced(part, slices), weights[index] * part.scale) for index, part in found]
        a = torch.cat([a for (a, _), _ in pairs], dim=-2)
        merged[name] = Product(a, torch.cat([b * scale for (_, b), scale in pairs], dim=-1), 1.0)
    return merged


def truncate_adapter(adapter: Adapter, rank: int) -> dict[str, Product]:
    """Truncate every product to its leading singular vectors, the best approximation of that rank (Eckart-Young).

    The size of the decomposed matrices is the current rank, not the size of the weights.

    Args:
        adapter: The adapter, for instance a sum.
        rank: The largest rank to keep, of every slice of a packed projection.

    Returns:
        An adapter of scale 1; both factors have the square roots of the singular values.

    Raises:
        ValueError: For a rank below 1.
    """
    check_rank(rank)
    truncated = {}
    for name, found in adapter.items():
        dtype = accumulator_dtype(found.a, found.b)
        left, inner_left = torch.linalg.qr(found.b.double() * found.scale)
        right, inner_right = torch.linalg.qr(found.a.double().mT)
        u, values, vh = torch.linalg.svd(inner_left @ inner_right.mT, full_matrices=False)
        a, b = _halves(u, values, vh, rank)
        truncated[name] = Product((a @ right.mT).to(dtype), (left @ b).to(dtype), 1.0)
    return truncated


def negate_adapter(adapter: Adapter) -> dict[str, Product]:
    """Negate every product by negating one of its factors.

    Args:
        adapter: The adapter.

    Example:
        >>> negate_adapter({"w": Product(torch.ones(1, 1), torch.ones(1, 1), 1.0)})["w"].dense()
        tensor([[-1.]])
    """
    return {name: Product(found.a, -found.b, found.scale) for name, found in adapter.items()}


def mean_of_factors(adapters: Sequence[Adapter]) -> dict[str, Product]:
    """Average A and B separately. This is *not* task arithmetic: a product of means is not a mean of products.

    A baseline: federated averaging of LoRA does this (PEFT's ``combination_type="linear"`` is similar). The
    two agree if all adapters share A. For the mean of the weight changes use ``sum_adapters`` with
    coefficients ``1 / len(adapters)``, and ``truncate_adapter`` for the rank.

    Args:
        adapters: At least one, all of the same weights, ranks and scales.

    Raises:
        ValueError: If they differ in one of these.
    """
    merged = {}
    for name, found in _by_weight(adapters).items():
        parts = [part for _, part in found]
        kinds = {(part.a.shape, part.b.shape, part.scale) for part in parts}
        if len(kinds) > 1 or len(parts) < len(adapters):
            raise ValueError(
                f"expected factors of {name!r} of one shape and scale in all {len(adapters)} adapters, got "
                f"{len(kinds)} kinds in {len(parts)} of them; use sum_adapters and truncate_adapter"
            )
        a, b = (torch.stack(stack).mean(dim=0) for stack in ([p.a for p in parts], [p.b for p in parts]))
        merged[name] = Product(a, b, parts[0].scale)
    return merged


def adapter_of(vector: State, rank: int) -> dict[str, Product]:
    """Approximate a dense merged vector of any merger, such as KnOTS or TIES, by the nearest adapter.

    Args:
        vector: A merged vector; parameters that are not matrices are left out. A packed ``in_proj_weight`` of
            ``nn.MultiheadAttention`` counts as three matrices.
        rank: Rank of every product.

    Returns:
        An adapter of scale 1.

    Raises:
        ValueError: For a rank below 1.
    """
    check_rank(rank)
    adapter = {}
    for name, tensor in vector.items():
        if tensor.ndim == 2 and tensor.numel():
            matrix = tensor.double()
            pieces = torch.stack(matrix.chunk(3)) if name.endswith("in_proj_weight") else matrix
            u, values, vh = torch.linalg.svd(pieces, full_matrices=False)
            a, b = _halves(u, values, vh, rank)
            dtype = accumulator_dtype(tensor)
            adapter[name] = Product(a.to(dtype), b.to(dtype), 1.0)
    return adapter


def _halves(u: Tensor, values: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of the leading singular triplets, each with the square roots of the singular values."""
    roots = values[..., :rank].sqrt()
    return roots.unsqueeze(-1) * vh[..., :rank, :], u[..., :rank] * roots.unsqueeze(-2)


def _by_weight(adapters: Sequence[Adapter]) -> dict[str, list[tuple[int, Product]]]:
    """Return, per weight name, the positions and products of the adapters that change it."""
    found: dict[str, list[tuple[int, Product]]] = {}
    for index, adapter in enumerate(adapters):
        for name, part in adapter.items():
            found.setdefault(name, []).append((index, part))
    for name, parts in found.items():
        if len(shapes := {part.shape for _, part in parts}) > 1:
            raise ValueError(f"expected one shape of {name!r} in all adapters, got {sorted(shapes)}")
    return found


def _sliced(part: Product, ndim: int) -> tuple[Tensor, Tensor]:
    """Return A and B in slices; the three slices of a packed projection share A if the product has only one."""
    if part.a.ndim == ndim:
        return part.a, part.b
    return part.a.expand(3, *part.a.shape), part.b.reshape(3, -1, part.b.shape[-1])


def check_rank(rank: int) -> None:
    """Raise a ValueError if a rank is below 1."""
    if rank < 1:
        raise ValueError(f"expected a rank of 1 or more, got {rank}")
