"""Fine-tuning of the weights themselves: all trainable weights of the backbone, or a part of them."""

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn
from typing_extensions import override

from clmerge.merging.finish.layers import block_indices
from clmerge.models.backbone import Backbone
from clmerge.models.tuning.tuning import Tuning
from clmerge.weights.selection import select_parameters

SCOPES = ("attention", "mlp", "layernorm", "bias")
"""Named scopes, parts of a transformer; any other scope is a glob pattern."""


class Full(Tuning):
    """Train the backbone's default weights: all of a timm model, the image tower of a CLIP model."""

    @override
    def apply(self, backbone: Backbone) -> None:
        train_only(backbone, select_parameters(backbone.model, backbone.default_trainable))


class Frozen(Tuning):
    """Freeze the backbone: a baseline with a head only, in which nothing is merged.

    With an untrained ``CosineHead``, every class is represented by the mean feature of its images (SimpleCIL,
    arXiv:2303.07338); with a ``LinearHead`` it is linear probing.
    """

    @override
    def prepare(self, backbone: Backbone) -> list[str]:
        self.apply(backbone)
        return []

    @override
    def apply(self, backbone: Backbone) -> None:
        backbone.requires_grad_(False)


class Partial(Tuning):
    """Train a part of the weights.

    Args:
        scope: ``attention`` (projections and their biases, pooling included), ``mlp``, ``layernorm``, ``bias`` (all
            biases; BitFit, arXiv:2106.10199), glob patterns over the model's own parameter names
            (``visual.proj``, ``blocks.*.norm?.*``), or a list of these, whose union is trained. Named scopes are
            restricted to the weights that ``Full`` trains. Default all of these.
        last_blocks: Restricts the scope to the last ``last_blocks`` blocks.

    Raises:
        ValueError: If neither is given, or nothing is left to train.
    """

    def __init__(self, scope: str | list[str] | None = None, *, last_blocks: int | None = None) -> None:
        if scope is None and last_blocks is None:
            raise ValueError(f"expected a scope ({', '.join(SCOPES)} or patterns) or last_blocks, got neither")
        if last_blocks is not None and last_blocks < 1:
            raise ValueError(f"expected last_blocks of 1 or more, got {last_blocks}")
        self.scope = scope
        self.last_blocks = last_blocks

    @override
    def apply(self, backbone: Backbone) -> None:
        train_only(backbone, scoped_parameters(backbone, self.scope, self.last_blocks))


def scoped_parameters(
    backbone: Backbone, scope: str | Sequence[str] | None = None, last_blocks: int | None = None
) -> list[str]:
    """Return the names of the wrapped model's parameters that are in a scope, in the model's order.

    Args:
        backbone: The backbone; only parameters that require gradients are considered.
        scope: As for ``Partial``.
        last_blocks: As for ``Partial``.

    Raises:
        ValueError: If a part of the scope matches nothing, or there are fewer blocks than ``last_blocks``.
    """
    offered = select_parameters(backbone.model, backbone.default_trainable)
    scopes = ["*"] if scope is None else [scope] if isinstance(scope, str) else list(scope)
    chosen = set[str]()
    for part in scopes:
        if part == "*":
            found = list(offered)
        elif part in SCOPES:
            found = _named(part, backbone.model, offered)
        else:
            # A misspelt scope would be taken for a pattern, and answered with the nearest parameter.
            if part.isalpha() and (near := difflib.get_close_matches(part, SCOPES, n=1)) and part not in offered:
                raise ValueError(
                    f"expected a scope ({', '.join(SCOPES)}) or a pattern that matches a parameter, got {part!r}; did "
                    f"you mean {near[0]!r}?"
                )
            found = list(select_parameters(backbone.model, [part]))
        if not found:
            raise ValueError(
                f"expected a backbone with parameters in scope {part!r}, got {type(backbone.model).__name__}"
            )
        chosen |= set(found)
    if last_blocks is not None:
        blocks = block_indices(offered)
        depth = 1 + max(blocks.values())
        if last_blocks > depth:
            raise ValueError(f"expected last_blocks of at most {depth}, the blocks of the backbone, got {last_blocks}")
        chosen = {name for name in chosen if blocks.get(name, -1) >= depth - last_blocks}
    if not chosen:
        raise ValueError(f"expected parameters to train in scope {scope!r} of the last {last_blocks} blocks, got none")
    return [name for name, _ in backbone.model.named_parameters() if name in chosen]


def train_only(backbone: Backbone, names: Iterable[str]) -> None:
    """Freeze a backbone except for the named parameters of its wrapped model.

    Args:
        backbone: Changed in place.
        names: Names of the wrapped model's parameters to train.
    """
    backbone.requires_grad_(False)
    for name in names:
        backbone.model.get_parameter(name).requires_grad_(True)


def _named(scope: str, model: nn.Module, offered: Iterable[str]) -> list[str]:
    if scope == "layernorm":
        norms = {
            f"{name}.{parameter}"
            for name, part in model.named_modules()
            if re.search("(layer|rms)norm", type(part).__name__, re.IGNORECASE)
            for parameter, _ in part.named_parameters(recurse=False)
        }
        return [name for name in offered if name in norms]
    pattern = {"attention": r"(^|\.)(self_)?attn", "mlp": r"(^|\.)mlp\.", "bias": r"(^|[._])bias$"}[scope]
    return [name for name in offered if re.search(pattern, name)]
