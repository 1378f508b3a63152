"""Context managers that temporarily change the mode or device of a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule  # clmerge merge reads running statistics without it


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Run a block with ``module`` in evaluation mode; the mode of every submodule is restored."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def on_device(module: LightningModule, device: torch.device) -> Iterator[None]:
    """Run a block with ``module`` moved to ``device`` in place; it is moved back afterwards."""
    before = module.device
    module.to(device)
    try:
        yield
    finally:
        module.to(before)
