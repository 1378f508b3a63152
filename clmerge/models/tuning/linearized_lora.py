"""Linearized LoRA: low-rank changes in the tangent space of the pretrained weights."""

from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from clmerge.models.backbone import Backbone
from clmerge.models.tuning.linearized import encoder_path
from clmerge.models.tuning.lora import BLOCKS, add_lora
from clmerge.models.tuning.low_rank import LowRank
from clmerge.models.tuning.tangent import TangentModule
from clmerge.models.tuning.tuning import Tuning
from clmerge.weights.factored import Product, product
from clmerge.weights.selection import select_parameters
from clmerge.weights.swap import full_copy
from clmerge.weights.task_vector import State, accumulator_dtype


class LinearizedLoRA(Tuning):
    """Train the first-order expansion in the factors of a LoRA model, L-LoRA (Tang et al., arXiv:2310.04742).

    Around ``A_0`` (random) and ``B_0 = 0`` the expansion is ``f(x; theta_0) + J(x; theta_0) tau`` with
    ``tau = alpha / rank * B A_0`` in every weight that has factors: the derivative in A is zero there, so only B is
    trained. ``A_0`` is the same for all tasks, so adding their B's adds their dense task vectors, which are merged.
    The whole image encoder is expanded, as in the paper's formula; linearizing each LoRA layer separately would be
    LoRA with a frozen A, and the model would not be linear in B.

    Args:
        rank: Rank of every change, as for ``LoRA``.
        alpha: The change is ``alpha / rank * B A_0``; default the rank.
        targets: Regular expression that is searched in the names of the weights, as for ``LoRA``.
        evaluate: As for ``Linearized``.
        checkpointing: As for ``Linearized``.
        seed: Seed of ``A_0``. Adapters of several runs can be added only if their seeds are equal.

    Raises:
        ValueError: As ``LoRA`` does, and for targets that are not part of the image encoder.
    """

    def __init__(
        self,
        *,
        rank: int = 8,
        alpha: float | None = None,
        targets: str = BLOCKS,
        evaluate: Literal["linear", "nonlinear"] = "linear",
        checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        self.rank = rank
        self.alpha = float(rank) if alpha is None else alpha
        self.targets = targets
        self.evaluate: Literal["linear", "nonlinear"] = evaluate
        self.checkpointing = checkpointing
        self.seed = seed

    @override
    def apply(self, backbone: Backbone) -> None:
        offered = select_parameters(backbone.model, backbone.default_trainable)
        names = add_lora(backbone.model, self.targets, rank=self.rank, alpha=self.alpha, among=offered)
        path = encoder_path(backbone, names)
        backbone.requires_grad_(False)
        generator = torch.Generator().manual_seed(self.seed)
        for part in backbone.modules():
            if isinstance(part, LowRank):
                part.renew(generator)
        module = LowRankTangentModule(
            backbone.get_submodule(path), evaluate=self.evaluate, checkpointing=self.checkpointing
        )
        backbone.set_submodule(path, module)


class LowRankTangentModule(TangentModule):
    """The first-order expansion of a module in the factors B of its LoRA layers, whose A is fixed.

    Every adapted weight also has its own frozen tangent: the change by earlier tasks, or a merged task vector of any
    rank.

    Args:
        base: A module after ``add_lora``; it is frozen.
        evaluate: As for ``TangentModule``.
        checkpointing: As for ``TangentModule``.

    Raises:
        ValueError: If the module has no LoRA layers, or as ``TangentModule`` does.
    """

    def __init__(
        self, base: nn.Module, *, evaluate: Literal["linear", "nonlinear"] = "linear", checkpointing: bool = False
    ) -> None:
        factors: dict[str, tuple[str, str, float]] = {}
        for path, part in base.named_modules():
            if isinstance(part, LowRank):
                prefix = f"{path}." if path else ""
                factors |= {
                    prefix + name: (f"{prefix}lora_A_{name}", f"{prefix}lora_B_{name}", part.lora_scale)
                    for name in part.names()
                }
        if not factors:
            raise ValueError(f"expected LoRA layers in {type(base).__name__}, got none; call add_lora first")
        named = dict(base.named_parameters())
        base.requires_grad_(False)
        for _, b, _ in factors.values():
            named[b].requires_grad_(True)
        super().__init__(base, evaluate=evaluate, checkpointing=checkpointing)
        self._factors = factors
        for name in factors:
            self._place(name, nn.Parameter(torch.zeros_like(named[name]), requires_grad=False))

    @override
    def names(self) -> list[str]:
        return list(self._factors)

    @override
    def inner(self) -> list[str]:
        tangents = [f"tangent.{name}" for name, _ in self.tangent.named_parameters()]
        return tangents + [f"base.{factor}" for a, b, _ in self._factors.values() for factor in (a, b)]

    @override
    def change(self) -> dict[str, Tensor]:
        base, tau = self._base(), self.tau()
        moved = {}
        for name, (a, b, scale) in self._factors.items():
            dtype = accumulator_dtype(tau[name])
            moved[name] = tau[name].to(dtype) + product(base[a].to(dtype), tau[b].to(dtype), scale)
        return moved

    @override
    def low_rank(self, base: State) -> dict[str, Product]:
        own, tau, found = self._base(), self.tau(), {}
        for name, start in base.items():
            a, b, scale = self._factors[name]
            if not tau[name].any() and torch.equal(own[name].to(start.device), start.to(own[name].dtype)):
                found[name] = Product(full_copy(own[a], start.device), full_copy(tau[b], start.device), scale)
        return found

    @override
    def state(self, base: State, tau: State) -> dict[str, Tensor]:
        tangents = self.tau()
        fresh = {f"tangent.{b}": torch.zeros_like(tangents[b]) for _, b, _ in (self._factors[name] for name in base)}
        return super().state(base, tau) | fresh

    @override
    @torch.no_grad()
    def renew(self, generator: torch.Generator) -> None:
        """Add the product to the frozen tangents and set B to zero; A is unchanged."""
        tangents = self.tau()
        for name, tau in self.change().items():
            tangents[name].copy_(tau)
            tangents[self._factors[name][1]].zero_()

    @override
    def folded(self) -> nn.Module:
        module = super().folded()
        for path, part in reversed(list(module.named_modules())):  # from the inside out
            if isinstance(part, LowRank):
                plain = part.folded()
                if not path:
                    return plain
                module.set_submodule(path, plain)
        return module
