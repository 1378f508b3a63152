"""Layers with frozen weights and low-rank factors named after these weights."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from clmerge.models.tuning.adapted import Adapted, OpenAttention
from clmerge.weights.factored import Product, product
from clmerge.weights.swap import assign, full_copy
from clmerge.weights.task_vector import State, TaskVector, accumulator_dtype, apply_task_vector


class LowRank(Adapted):
    """A layer with weights ``W + scale * B A``: W is frozen under its old name, A and B are trained.

    Attributes:
        lora_scale: ``alpha / rank``.
        lora_weights: Names of the weights that have factors: ``lora_A_NAME`` of shape ``(rank, in)`` and
            ``lora_B_NAME`` of shape ``(out, rank)``; for a packed input projection ``(3, rank, in)`` and
            ``(3, out / 3, rank)``, so that query, key and value each have a product of that rank.
    """

    settings = ("lora_scale", "lora_weights")
    lora_scale: float
    lora_weights: tuple[str, ...]

    @override
    def names(self) -> tuple[str, ...]:
        return self.lora_weights

    @override
    def inner(self) -> list[str]:
        return [f"lora_{side}_{name}" for name in self.lora_weights for side in "AB"]

    @override
    def low_rank(self, base: State) -> dict[str, Product]:
        found = {}
        for name, start in base.items():
            weight = full_copy(self.own(name), start.device)
            if torch.equal(weight, start.to(weight.dtype)):
                a, b = (full_copy(factor, start.device) for factor in self.factors(name))
                found[name] = Product(a, b, self.lora_scale)
        return found

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A and B of a weight."""
        return cast(Tensor, getattr(self, f"lora_A_{name}")), cast(Tensor, getattr(self, f"lora_B_{name}"))

    def dense_weight(self, name: str) -> Any:
        """Return ``W + scale * B A`` of a weight, or the weight itself if it has no factors."""
        weight = self._parameters[name]
        if name not in self.lora_weights or weight is None:
            return weight
        a, b = self.factors(name)
        with torch.autocast(weight.device.type, enabled=False):
            return weight + product(a, b, self.lora_scale)

    @override
    def dense(self) -> dict[str, Tensor]:
        return {name: self.dense_weight(name) for name in self.lora_weights}

    @override
    def delta(self, base: State) -> TaskVector:
        """Return ``(W - base) + scale * B A``, computed on the base's device; exact if W equals the base."""
        vector = {}
        for name, start in base.items():
            weight, a, b = (full_copy(t, start.device) for t in (self.own(name), *self.factors(name)))
            dtype = accumulator_dtype(weight, start)
            vector[name] = (weight.to(dtype) - start.to(dtype)).add_(product(a.to(dtype), b.to(dtype), self.lora_scale))
        return vector

    @override
    def state(self, base: State, tau: State) -> dict[str, Tensor]:
        values = dict(apply_task_vector(base, tau))
        for name in base:
            _, b = self.factors(name)
            values[f"lora_B_{name}"] = torch.zeros(b.shape, dtype=b.dtype, device=b.device)
        return values

    @override
    @torch.no_grad()
    def renew(self, generator: torch.Generator | None) -> None:
        """Add the product to the weight, redraw A with PyTorch's initialisation of linear layers, set B to zero."""
        for name in self.lora_weights:
            a, b = self.factors(name)
            self.own(name).add_(product(a, b, self.lora_scale))
            bound = 1 / math.sqrt(a.shape[-1])
            drawn = torch.empty(a.shape).uniform_(-bound, bound, generator=generator)
            assign({"a": a}, {"a": drawn})
            b.zero_()

    def add_factors(self, name: str, rank: int) -> None:
        """Freeze a weight and add factors, all zero; ``renew`` draws A."""
        self.lora_weights += (name,)
        weight = self.own(name).requires_grad_(False)
        slices = (3,) if name == "in_proj_weight" else ()
        rows, columns = weight.shape[0] // (3 if slices else 1), weight.shape[1]
        for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            self.register_parameter(f"lora_{side}_{name}", nn.Parameter(weight.new_zeros((*slices, *shape))))


class LoRALinear(LowRank, nn.Linear):
    """A linear layer that applies the factors to the activations: ``W x + b + scale * B (A x)``."""

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """``W + scale * B A``."""
        return self.dense_weight("weight")

    @override
    def forward(self, input: Tensor) -> Tensor:
        a, b = self.factors("weight")
        whole = functional.linear(input, self.own("weight"), self.bias)
        return whole + functional.linear(functional.linear(input, a), b) * self.lora_scale


class LoRAMultiheadAttention(LowRank, OpenAttention):
    """An attention layer whose input projections are ``W + scale * B A``."""

    @property
    def in_proj_weight(self) -> Any:  # type: ignore[override]
        """The packed input projections, factors included."""
        return self.dense_weight("in_proj_weight")

    @property
    def q_proj_weight(self) -> Any:  # type: ignore[override]
        """The projection of the queries, factors included."""
        return self.dense_weight("q_proj_weight")

    @property
    def k_proj_weight(self) -> Any:  # type: ignore[override]
        """The projection of the keys, factors included."""
        return self.dense_weight("k_proj_weight")

    @property
    def v_proj_weight(self) -> Any:  # type: ignore[override]
        """The projection of the values, factors included."""
        return self.dense_weight("v_proj_weight")
