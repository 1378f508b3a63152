"""Coefficients by depth: finishers with a coefficient per block of the network."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from typing_extensions import override

from clmerge.merging.finish.finisher import Finisher
from clmerge.merging.norms import l1_norm
from clmerge.weights.task_vector import State, TaskVector

BLOCK = r"\b(?:resblocks|blocks|layers|layer|h)\.(\d+)\."
"""Matches block names of CLIP, timm and Hugging Face transformers; the group is the index of the block."""


class LayerScale(Finisher):
    """Multiply every block of the network by its own coefficient.

    Args:
        coefficients: One coefficient per block, starting at the input.
        default: Coefficient of parameters outside of the blocks, such as embeddings and the final norm.
        block: Regular expression that finds the index of a block in a parameter name, as its only group; its first
            match in the name counts. Default: ``resblocks.3.``, ``blocks.3.``, ``layers.3.``, ``layer.3.`` and
            ``h.3.``.

    Example:
        >>> import torch
        >>> vector = {"stem": torch.ones(1), "blocks.0.w": torch.ones(1), "blocks.1.w": torch.ones(1)}
        >>> LayerScale([0.5, 2.0]).finish(vector)
        {'stem': tensor([1.]), 'blocks.0.w': tensor([0.5000]), 'blocks.1.w': tensor([2.])}
    """

    name = "layer_scale"

    def __init__(self, coefficients: Sequence[float], *, default: float = 1.0, block: str = BLOCK) -> None:
        self.coefficients = list(coefficients)
        self.default = default
        self.block = block
        check_block_pattern(block)

    @override
    def check_names(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._indices(shapes)

    @override
    def finish(self, vector: TaskVector) -> TaskVector:
        """Finish a merged vector.

        Raises:
            ValueError: If there are no blocks, or not as many as coefficients.
        """
        return _times(vector, {n: self.coefficients[i] for n, i in self._indices(vector).items()}, self.default)

    def _indices(self, names: Iterable[str]) -> dict[str, int]:
        indices = block_indices(names, self.block)
        depth = 1 + max(indices.values())
        if depth != len(self.coefficients):
            raise ValueError(
                f"expected one coefficient for each of the {depth} blocks of the merged parameters, got "
                f"{len(self.coefficients)}"
            )
        return indices


class LiNeS(Finisher):
    """Scale the merged vector by depth, shallow blocks least (Wang et al., arXiv 2410.17146).

    Block l of L is multiplied by ``alpha + beta * l / (L - 1)``. Parameters outside of the blocks, including the final
    norm and the projection, are multiplied by ``alpha``, as in the released code.

    For multi-task merging the paper computes alpha from the norms, ``alpha = |sum(tau_t)|_1 / |tau_merged|_1 / T``,
    and searches beta from 0.1 to 1.5. This is ``alpha="auto"``: the pipeline then also keeps the sum of the task
    vectors, 4 bytes per parameter. For ``TaskArithmetic(scale)`` alpha is ``1 / (T * scale)``. For a single task the
    paper sets ``alpha = g`` and ``beta = 1 - g``; the defaults are g = 0.5.

    Args:
        alpha: Coefficient of the first block and of parameters outside of the blocks; ``"auto"`` computes it from the
            norms.
        beta: Difference between the coefficients of the last and the first block.
        num_blocks: L, for vectors that leave out the last blocks. Default: one more than the largest index, separately
            for every tower (the part of the name before the block).
        block: Regular expression that finds the index of a block in a parameter name, as its only group; its first
            match in the name counts. Default: ``resblocks.3.``, ``blocks.3.``, ``layers.3.``, ``layer.3.`` and
            ``h.3.``.

    Example:
        >>> import torch
        >>> vector = {"stem": torch.ones(1), "blocks.0.w": torch.ones(1), "blocks.1.w": torch.ones(1)}
        >>> LiNeS(alpha=0.25, beta=0.5).finish(vector)
        {'stem': tensor([0.2500]), 'blocks.0.w': tensor([0.2500]), 'blocks.1.w': tensor([0.7500])}
    """

    name = "lines"

    def __init__(
        self,
        alpha: float | Literal["auto"] = 0.5,
        beta: float = 0.5,
        *,
        num_blocks: int | None = None,
        block: str = BLOCK,
    ) -> None:
        if isinstance(alpha, str) and alpha != "auto":
            raise ValueError(f"expected a number or 'auto' as alpha, got {alpha!r}")
        self.alpha: float | Literal["auto"] = alpha
        self.beta = beta
        self.num_blocks = num_blocks
        self.block = block
        self.uses_sum = alpha == "auto"
        check_block_pattern(block)

    @override
    def check_names(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._coefficients(shapes, 0.0)

    @override
    def finish_beside(self, vector: TaskVector, total: State, num_tasks: int) -> TaskVector:
        if self.alpha != "auto":
            return self.finish(vector)
        norm = l1_norm(vector)
        return self._scaled(vector, l1_norm(total) / norm / num_tasks if norm else 0.0)

    @override
    def finish(self, vector: TaskVector) -> TaskVector:
        """Finish a merged vector.

        Raises:
            ValueError: If alpha is "auto", which requires a pipeline; if there are no blocks, a tower has only one
                block, or there are more than ``num_blocks``.
        """
        if self.alpha == "auto":
            raise ValueError("expected the sum of the task vectors for alpha='auto', got none; finish in a Pipeline")
        return self._scaled(vector, self.alpha)

    def _scaled(self, vector: TaskVector, alpha: float) -> TaskVector:
        return _times(vector, self._coefficients(vector, alpha), alpha)

    def _coefficients(self, all_names: Iterable[str], alpha: float) -> dict[str, float]:
        indices = block_indices(all_names, self.block)
        towers: dict[str, list[str]] = {}
        for name in indices:
            towers.setdefault(_tower(name, self.block), []).append(name)
        coefficients = {}
        for tower, names in towers.items():
            found = 1 + max(indices[name] for name in names)
            depth = self.num_blocks or found
            if depth < max(found, 2):
                raise ValueError(
                    f"expected 2 blocks or more and all of them within num_blocks={self.num_blocks}, got {found} in "
                    f"{tower!r}; set num_blocks to the depth of the network"
                )
            coefficients.update({name: alpha + self.beta * indices[name] / (depth - 1) for name in names})
        return coefficients


def block_indices(names: Iterable[str], block: str = BLOCK) -> dict[str, int]:
    """Return the block index of every parameter that is in a block.

    Args:
        names: Parameter names.
        block: Regular expression with the index as its only group.

    Raises:
        ValueError: If no name is in a block.

    Example:
        >>> block_indices(["visual.conv1", "visual.transformer.resblocks.3.ln_1.bias"])
        {'visual.transformer.resblocks.3.ln_1.bias': 3}
    """
    names = list(names)
    found = {name: int(match[1]) for name in names if (match := re.search(block, name))}
    if not found:
        raise ValueError(
            f"expected parameters in numbered blocks ({block}), got {', '.join(map(repr, names[:3]))}...; set block "
            "to the regular expression that finds the index"
        )
    return found


def check_block_pattern(block: str) -> None:
    """Raise a ValueError unless ``block`` is a regular expression with one group."""
    try:
        groups = re.compile(block).groups
    except re.error as error:
        raise ValueError(f"expected a regular expression for block, got {block!r}: {error}") from error
    if groups != 1:
        raise ValueError(f"expected one group for the index in block, got {groups} in {block!r}")


def _tower(name: str, block: str) -> str:
    match = re.search(block, name)
    return name[: match.start()] if match else ""


def _times(vector: TaskVector, coefficients: Mapping[str, float], default: float) -> TaskVector:
    for name, tensor in vector.items():
        tensor.mul_(coefficients.get(name, default))
    return vector
