"""Diagnostics of stored task vectors, with one parameter in memory at a time for any number of tasks."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from clmerge.evaluation.diagnostics.json_types import to_json
from clmerge.evaluation.diagnostics.pairs import PairSums, pair_sums
from clmerge.evaluation.diagnostics.spectra import effective_rank, spectrum, subspace_overlap
from clmerge.merging.finish.layers import BLOCK
from clmerge.merging.matrices import Matrices
from clmerge.weights import TaskVectorBank
from clmerge.weights.factored import TensorFile


def diagnose_vectors(
    bank: TaskVectorBank,
    tasks: Sequence[int] | None = None,
    *,
    rank: int = 8,
    matrices: Matrices | None = None,
) -> dict[str, Any]:
    """Compare the task vectors of a bank: norms, cosines, sign conflicts, effective ranks, subspace overlaps.

    One parameter is in memory at a time: a piece of it from every task for the sums, all of it from one task for the
    singular values, and ``rank`` singular vectors of every task. The files are memory-mapped.

    Args:
        bank: The task vectors.
        tasks: Indices of the tasks to compare. Default: all.
        rank: Dimension of the leading singular subspaces that are compared.
        matrices: Which parameters are matrices. Default: those with two dimensions, fused query-key-value weights
            as one, as for the spectral mergers.

    Returns:
        The ``vectors`` part of the diagnostics document (docs/diagnostics.md); undefined numbers are null.

    Raises:
        ValueError: If there are fewer than two tasks, or ``rank`` is below 1.
        IndexError: If a task is not stored.
    """
    tasks = bank.tasks if tasks is None else list(tasks)
    if len(tasks) < 2:
        raise ValueError(f"expected two task vectors or more to compare, got {len(tasks)} in {bank.folder}")
    if rank < 1:
        raise ValueError(f"expected a rank of 1 or more, got {rank}")
    matrices = Matrices() if matrices is None else matrices
    names = [bank.metadata(task)["name"] or f"task {task + 1}" for task in tasks]
    layers: dict[str, PairSums] = {}
    spectra: list[dict[str, Any]] = []
    for name, taus in _parameters(bank, tasks):
        layer, sums = layer_of(name), pair_sums(taus)
        layers[layer] = layers[layer] + sums if layer in layers else sums
        spectra += _compare_matrices(name, taus, matrices, rank)
    whole, *others = layers.values()
    for sums in others:
        whole = whole + sums
    found: dict[str, Any] = to_json(
        {
            "tasks": names,
            "whole": _pairs(whole),
            "layers": [{"name": name, **_pairs(layers[name])} for name in sorted(layers, key=natural)],
            "rank": rank,
            "matrices": sorted(spectra, key=lambda entry: natural(entry["name"])),
        }
    )
    return found


def layer_of(name: str) -> str:
    """Return the layer of a parameter: its block, or its name without the last part.

    Example:
        >>> layer_of("visual.transformer.resblocks.3.ln_1.bias"), layer_of("visual.ln_pre.weight")
        ('visual.transformer.resblocks.3', 'visual.ln_pre')
        >>> layer_of("visual.class_embedding")
        'visual.class_embedding'
    """
    match = re.search(BLOCK, name)
    if match:
        return name[: match.end() - 1]
    return name.removesuffix(".weight").removesuffix(".bias")


def natural(name: str) -> list[tuple[str, int]]:
    """Return a sort key that orders block 10 after block 2."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]


def _parameters(bank: TaskVectorBank, tasks: Sequence[int]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield every parameter with its memory-mapped tensors, one per task."""
    for task in tasks:
        bank.metadata(task)  # raises an error that lists the stored tasks
    with ExitStack() as stack:
        files = [stack.enter_context(TensorFile(bank.path(task))) for task in tasks]
        for name in files[0].names():
            yield name, [file.read(name) for file in files]


def _pairs(sums: PairSums) -> dict[str, Any]:
    return {
        "numel": sums.numel,
        "norm": sums.norms(),
        "cosine": sums.cosines(),
        "sign_conflict": sums.sign_conflicts(),
    }


def _compare_matrices(name: str, taus: Sequence[Tensor], matrices: Matrices, rank: int) -> Iterator[dict[str, Any]]:
    count = matrices.count(name, tuple(taus[0].shape))
    for index in range(count):
        # One task at a time: only the leading vectors are kept.
        found = [spectrum(matrices.pieces(name, tau)[index], rank) for tau in taus]
        rows, columns = matrices.pieces(name, taus[0])[index].shape
        yield {
            "name": name if count == 1 else f"{name}[{index}]",
            "layer": layer_of(name),
            "shape": [rows, columns],
            "effective_rank": [effective_rank(spectrum.values) for spectrum in found],
            "left_overlap": _overlaps([spectrum.left for spectrum in found]),
            "right_overlap": _overlaps([spectrum.right for spectrum in found]),
        }


def _overlaps(bases: Sequence[Tensor]) -> list[list[float]]:
    return [[subspace_overlap(left, right) for right in bases] for left in bases]
