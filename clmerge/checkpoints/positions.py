"""Resample a base's position embeddings to the image size of its models as timm and open_clip do, or refuse them."""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase, translate
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from clmerge.checkpoints.reader import Checkpoint

_IMAGE = ("pos_embed", "*.pos_embed", "visual.positional_embedding", "*.visual.positional_embedding")
_OTHER = ("*positional_embedding", "*position_embedding*", "*pos_embedding*", "*relative_position*", "*rel_pos*")

_POSITIONS = re.compile("|".join(map(translate, (*_IMAGE, *_OTHER))))


def fit_positions(base: Checkpoint, models: Sequence[Checkpoint], is_merged: Callable[[str], bool]) -> list[str]:
    """Resample the base's position embeddings to the image size of the models, at which fine-tuning began.

    Args:
        base: The base model; changed in place.
        models: Models with the base's names.
        is_merged: Returns, by name, whether a tensor is to be merged.

    Returns:
        Descriptions of the resampled tensors.

    Raises:
        ValueError: If position embeddings of different shapes cannot be resampled.
    """
    notes = []
    for name, entry in list(base.entries.items()):
        if not _POSITIONS.match(name) or not is_merged(name):
            continue
        shapes = {model.entries[name].shape: model for model in reversed(models) if name in model.entries}
        if shapes.keys() <= {entry.shape}:
            continue
        wanted, model = next((shape, model) for shape, model in shapes.items() if shape != entry.shape)
        is_image = any(fnmatchcase(name, pattern) for pattern in _IMAGE) and entry.dtype.is_floating_point
        resampled = _resampled(base.tensor(name), wanted) if is_image and len(shapes) == 1 else None
        if resampled is None:
            raise ValueError(
                f"expected positions of one image size, got {name!r} of shape {entry.shape} in {base.source} and "
                f"{wanted} in {model.source}; name a base of that size, or copy the base's with --exclude {name}"
            )
        base.replace(name, resampled)
        notes.append(f"resampled {name} of the base from {entry.shape} to {wanted}, as timm and open_clip do")
    return notes


def _resampled(positions: Tensor, wanted: Sequence[int]) -> Tensor | None:
    """Resample positions ``(N, D)`` or ``(1, N, D)`` to another square grid; return None if a shape is not a grid.

    The bits equal those of timm's ``resample_abs_pos_embed`` and of open_clip's ``resize_pos_embed``.
    """
    if positions.ndim not in (2, 3) or positions.ndim != len(wanted) or positions.shape[-1] != wanted[-1]:
        return None
    num_old, num_new = positions.shape[-2], wanted[-2]
    if positions.numel() != num_old * positions.shape[-1]:
        return None
    # Tokens before the grid: class, distillation, registers.
    first = [n for n in range(min(num_old, num_new, 17)) if _is_square(num_old - n) and _is_square(num_new - n)]
    if len(first) != 1:
        return None
    rows = positions.reshape(num_old, -1)
    old, new = isqrt(num_old - first[0]), isqrt(num_new - first[0])
    grid = rows[first[0] :].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    is_timm = positions.ndim == 3  # timm computes in float32 and rounds to the input's dtype
    if is_timm or positions.dtype.itemsize < 4:
        grid = grid.float()
    grid = interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(new * new, -1)
    if is_timm:
        grid = grid.to(positions.dtype)
    return torch.cat([rows[: first[0]].to(grid.dtype), grid]).reshape(tuple(wanted))


def _is_square(number: int) -> bool:
    return isqrt(number) ** 2 == number
