"""Merge every update of an optimizer with what the model had learned before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from clmerge.callbacks.merge import MergeCallback
from clmerge.callbacks.ranks import refuse_parts
from clmerge.callbacks.step_hooks import StepHooks
from clmerge.lightning_compat import callbacks_of
from clmerge.seeds import seeded_uniform
from clmerge.weights.selection import trained_parameters


class OnlineMerging(StepHooks):
    """Merge every step of any optimizer with a reference vector (online merging optimizers, arXiv 2405.17931).

    With ``delta`` the optimizer's own update of a parameter and ``tau`` the reference, the parameter moves by
    ``(1 - alpha) s(delta) + alpha s(tau)``, where ``s`` keeps a share ``reserve`` of the entries: random ones, rescaled
    (``dare``), or the largest, after which only entries of the elected sign count (``ties``). The reference is what the
    model had learned when the fit began: its weights minus theta_0, which is ``MergeCallback``'s, or ``base``. In a
    first task it is zero, and updates are only thinned. The released code moves one parameter alone where it
    merges at every k-th step; here all move.

    Random choices are a function of seed, step and parameter name. The state is in Lightning's checkpoints. Two copies
    of the trained weights are kept: the reference, and during a step the weights before it.

    Args:
        alpha: Share of the reference in every merged step, from 0 to 1; the steps add up, so it is small.
        reserve: Share of the entries of both that is kept, above 0 to 1.
        rule: ``dare`` or ``ties``.
        every: Merge at every so many steps; the others are the optimizer's own.
        base: theta_0 by the module's parameter names; default that of the ``MergeCallback``.
        seed: Seed of the random choices.

    Raises:
        ValueError: If a number is out of range; during a fit, without a theta_0.
        RuntimeError: During a fit whose processes hold parts of the weights.

    Example:
        >>> OnlineMerging(alpha=1e-4, reserve=0.5).rule
        'dare'
    """

    def __init__(
        self,
        alpha: float = 1e-4,
        *,
        reserve: float = 0.5,
        rule: Literal["dare", "ties"] = "dare",
        every: int = 1,
        base: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= alpha <= 1 or not 0 < reserve <= 1 or every < 1 or rule not in ("dare", "ties"):
            raise ValueError(
                "expected alpha from 0 to 1, reserve above 0 to 1, every of 1 or more and rule 'dare' or 'ties', got "
                f"alpha={alpha}, reserve={reserve}, every={every}, rule={rule!r}"
            )
        super().__init__()
        self.alpha, self.reserve, self.rule, self.every = alpha, reserve, rule, every
        self.base = None if base is None else dict(base)
        self.seed = seed
        self._reference: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._task = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._reference = {}  # before Lightning restores a checkpoint

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = trained_parameters(pl_module)
        refuse_parts(pl_module, type(self).__name__)
        merge = next((one for one in callbacks_of(trainer) if isinstance(one, MergeCallback)), None)
        self._task = 0 if merge is None else merge.num_tasks
        if not self._reference:
            base = self.base if self.base is not None else None if merge is None else merge.base
            if base is None:
                raise ValueError("expected base, the weights that OnlineMerging's reference is measured from, got none")
            # MergeCallback takes theta_0 when training starts, and may do so after this: nothing was learned then.
            self._reference = {
                name: parameter.detach() - base[name].to(parameter) if name in base else torch.zeros_like(parameter)
                for name, parameter in parameters.items()
            }
        self._around_steps(
            trainer,
            before=lambda _: self._remember(trainer, pl_module),
            after=lambda optimizer: self._merge(optimizer, trainer, pl_module),
        )

    def _remember(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.global_step + 1) % self.every == 0:
            self._before = {name: p.detach().clone() for name, p in trained_parameters(pl_module).items()}

    @torch.no_grad()
    def _merge(self, optimizer: Optimizer, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._before or (self.alpha == 0 and self.reserve == 1):
            return
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in trained_parameters(pl_module).items():
            if id(parameter) not in own:
                continue
            self._reference[name] = self._reference[name].to(parameter)
            before = self._before[name]
            delta = parameter.detach() - before
            parameter.copy_(before + self._merged(name, delta, self._reference[name], trainer.global_step))
        self._before = {}

    def _merged(self, name: str, delta: Tensor, tau: Tensor, step: int) -> Tensor:
        """Return the update of one parameter."""
        first, second = (
            self._kept(vector, name, step, purpose) for vector, purpose in ((delta, "delta"), (tau, "reference"))
        )
        first, second = (1 - self.alpha) * first, self.alpha * second
        if self.rule == "dare":
            return first + second
        sign = (first + second).sign()
        return first * (first.sign() == sign) + second * (second.sign() == sign)

    def _kept(self, vector: Tensor, name: str, step: int, purpose: str) -> Tensor:
        if self.reserve == 1:
            return vector
        if self.rule == "dare":
            label = f"{self._task}/{name}"
            drawn = seeded_uniform(vector, seed=self.seed, task=step, name=label, purpose=f"online {purpose}")
            return vector * (drawn < self.reserve) / self.reserve
        number = max(1, round(self.reserve * vector.numel()))
        threshold = vector.abs().flatten().float().kthvalue(vector.numel() - number + 1).values
        return vector * (vector.abs() >= threshold)

    @override
    def _leave(self) -> None:
        super()._leave()
        self._before = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"reference": {name: tensor.to("cpu", copy=True) for name, tensor in self._reference.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._reference = dict(state_dict["reference"])
