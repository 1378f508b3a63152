"""Train with a share of the weights at zero, so that averages of such trainings are as sparse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from clmerge.callbacks.frozen import refuse_unfreezing
from clmerge.callbacks.ranks import refuse_parts
from clmerge.callbacks.step_hooks import StepHooks
from clmerge.weights.selection import is_included, trained_parameters


class Sparse(StepHooks):
    """Prune the smallest weights when a fit begins, and keep them at zero while it trains (arXiv 2306.16788).

    Fits that start from the same weights prune the same ones, so that their average is as sparse as each of them: the
    branches of a task, whose next round keeps the mask, and tasks under ``start_policy=base``, whose vectors agree that
    pruned weights go to zero (an average of the vectors keeps that, a scaled sum does not). Weights are compared by
    size over all pruned parameters together.

    Args:
        sparsity: Share of the weights that is zero, from 0 to below 1.
        include: Glob patterns of the parameters to prune; default all trained ones with two dimensions or more.

    Raises:
        ValueError: If the share is out of range; during a fit, if ``include`` selects nothing.
        RuntimeError: During a fit whose processes hold parts of the weights.

    Example:
        >>> Sparse(0.25).sparsity
        0.25
    """

    def __init__(self, sparsity: float = 0.5, *, include: Sequence[str] | None = None) -> None:
        if not 0 <= sparsity < 1:
            raise ValueError(f"expected sparsity as a share from 0 to below 1, got {sparsity}")
        super().__init__()
        self.sparsity = sparsity
        self.include = None if include is None else list(include)
        self._kept: dict[str, Tensor] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._kept = {}  # before Lightning restores a checkpoint

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_parts(pl_module, type(self).__name__)
        refuse_unfreezing(trainer, type(self).__name__)
        if not self._pruned(pl_module):
            raise ValueError(f"expected include to select trained parameters, got none that match {self.include}")
        self._around_steps(trainer, after=lambda _: self._prune(pl_module))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._kept:  # later than on_train_start, where MergeCallback may take theta_0
            parameters = self._pruned(pl_module)
            sizes = torch.cat([p.detach().abs().flatten().float() for p in parameters.values()])
            least = sizes.argsort(stable=True)[: round(self.sparsity * len(sizes))]
            kept = torch.ones_like(sizes, dtype=torch.bool)
            kept[least] = False
            parts = torch.split(kept, [p.numel() for p in parameters.values()])
            self._kept = {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}
            self._prune(pl_module)

    @torch.no_grad()
    def _prune(self, pl_module: LightningModule) -> None:
        for name, parameter in self._pruned(pl_module).items():
            self._kept[name] = self._kept[name].to(parameter.device)
            parameter.mul_(self._kept[name])

    def _pruned(self, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in trained_parameters(pl_module).items()
            if (parameter.ndim > 1 if self.include is None else is_included(name, self.include))
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"kept": {name: mask.to("cpu", copy=True) for name, mask in self._kept.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kept = dict(state_dict["kept"])
