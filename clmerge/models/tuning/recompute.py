"""Gradient checkpointing of the blocks of a tangent model."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from clmerge.models.tuning.closed_forms import ClosedForms, join, split


def recompute_blocks(module: nn.Module) -> None:
    """Recompute the activations of the blocks (the module's largest list of modules) in the backward pass.

    A model's own checkpointing passes dual tensors to the backward pass, where their tangents no longer exist. Here
    every block gets values and tangents as ordinary tensors, and its own forward-mode pass when it is recomputed.

    Args:
        module: Changed in place; parameter names are unchanged.

    Raises:
        ValueError: If the module has no list (``ModuleList`` or ``Sequential``) of at least two members.
    """
    lists = [part for part in module.modules() if isinstance(part, (nn.ModuleList, nn.Sequential)) and len(part) > 1]
    if not lists:
        raise ValueError(
            f"expected a list of blocks to checkpoint in {type(module).__name__}, got a module without a ModuleList "
            "or Sequential; leave checkpointing off"
        )
    for block in max(lists, key=lambda part: sum(parameter.numel() for parameter in part.parameters())):
        block.forward = MethodType(_recomputed, block)  # bound to the block itself, so that deepcopy binds it anew


class _Plain(nn.Module):
    """A block with the original forward of its class."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)


def _recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # A compiler chooses itself which activations to keep, and cannot trace this.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return type(block).forward(block, *args, **kwargs)
    weights = {f"block.{name}": parameter for name, parameter in block.named_parameters()}
    duals = [*args, *weights.values()]
    values, tangents = zip(*(split(x) if isinstance(x, Tensor) else (x, None) for x in duals), strict=True)

    def run(*flat: Any) -> tuple[Tensor, Tensor | None]:
        half = len(duals)
        joined = [x if dx is None else join(x, dx) for x, dx in zip(flat[:half], flat[half:], strict=True)]
        inputs, parameters = joined[: len(args)], joined[len(args) :]
        return split(functional_call(_Plain(block), dict(zip(weights, parameters, strict=True)), tuple(inputs), kwargs))

    output, change = checkpoint(run, *values, *tangents, use_reentrant=False, context_fn=_contexts)
    return join(output, change)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _forward_mode()


@contextmanager
def _forward_mode() -> Iterator[None]:
    with forward_ad.dual_level(), ClosedForms():
        yield
