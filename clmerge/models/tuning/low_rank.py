"""Layers with low-rank factors beside frozen weights, which carry the weights' names."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from clmerge.weights.parametrization import Parametrized
from clmerge.weights.swap import assign, full_copy
from clmerge.weights.task_vector import State, TaskVector, accumulator_dtype, apply_task_vector


class LowRank(Parametrized):
    """A layer with weights ``W + scale * B A``: W is frozen under its old name, A and B are trained.

    Not constructed but made of a layer by ``add_lora``, which keeps its parameters, hooks and place. ``layer.weight``
    is the sum, so code that reads the weight instead of calling the layer (``nn.MultiheadAttention`` with its output
    projection, timm's EVA) trains the factors, too.

    Attributes:
        lora_scale: ``alpha / rank``.
        lora_weights: Names of the weights that have factors: ``lora_A_NAME`` of shape ``(rank, in)`` and
            ``lora_B_NAME`` of shape ``(out, rank)``; for a packed input projection ``(3, rank, in)`` and
            ``(3, out / 3, rank)``, so that query, key and value have a product of that rank each.
        lora_plain: The class that the layer had.
    """

    answers_for_children = False
    lora_scale: float
    lora_weights: tuple[str, ...]
    lora_plain: type[nn.Module]

    @override
    def names(self) -> tuple[str, ...]:
        return self.lora_weights

    @override
    def inner(self) -> list[str]:
        return [f"lora_{side}_{name}" for name in self.lora_weights for side in "AB"]

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
        """Return ``(W - base) + scale * B A``, computed where the base is; exact where W is the base."""
        vector = {}
        for name, start in base.items():
            weight, a, b = (full_copy(t, start.device) for t in (self._own(name), *self.factors(name)))
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
        """Add the product to the weight, draw A anew as PyTorch initialises linear layers, and set B to zero."""
        for name in self.lora_weights:
            a, b = self.factors(name)
            self._own(name).add_(product(a, b, self.lora_scale))
            bound = 1 / math.sqrt(a.shape[-1])
            drawn = torch.empty(a.shape).uniform_(-bound, bound, generator=generator)
            assign({"a": a}, {"a": drawn})
            b.zero_()

    @override
    def folded(self) -> nn.Module:
        plain = _shallow_copy(self)
        plain.__class__ = self.lora_plain
        with torch.no_grad():
            for name, weight in self.dense().items():
                plain._parameters[name] = nn.Parameter(weight)
        for name in self.inner():
            del plain._parameters[name]
        for name in ("lora_scale", "lora_weights", "lora_plain"):
            del plain.__dict__[name]
        return plain

    def _own(self, name: str) -> nn.Parameter:
        weight = self._parameters[name]
        assert weight is not None
        return weight

    def _adapt(self, name: str, rank: int) -> None:
        weight = self._own(name).requires_grad_(False)
        slices = (3,) if name == "in_proj_weight" else ()
        rows, columns = weight.shape[0] // (3 if slices else 1), weight.shape[1]
        for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            self.register_parameter(f"lora_{side}_{name}", nn.Parameter(weight.new_zeros((*slices, *shape))))


class LoRALinear(LowRank, nn.Linear):
    """A linear layer that adds its product on the activations: ``W x + b + scale * B (A x)``."""

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """``W + scale * B A``."""
        return self.dense_weight("weight")

    @override
    def forward(self, input: Tensor) -> Tensor:
        a, b = self.factors("weight")
        whole = functional.linear(input, self._own("weight"), self.bias)
        return whole + functional.linear(functional.linear(input, a), b) * self.lora_scale


class LoRAMultiheadAttention(LowRank, nn.MultiheadAttention):
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

    @override
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        # PyTorch's own would ask for the projections, which are computed here, several times before it uses them.
        turned = self.batch_first and query.dim() == 3
        if turned:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        attended, weights = functional.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return attended.transpose(0, 1) if turned else attended, weights


def product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``scale * B A`` in the shape of the weight, slices on top of each other.

    Args:
        a: A of shape ``(rank, in)`` or ``(slices, rank, in)``.
        b: B of shape ``(out, rank)`` or ``(slices, out / slices, rank)``.
        scale: The factor.

    Returns:
        Shape ``(out, in)``.
    """
    return (b @ a).mul(scale).reshape(-1, a.shape[-1])


def _shallow_copy(module: nn.Module) -> nn.Module:
    """Return a module of its own that has the same parameters, buffers, children and hooks."""
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        copied.__dict__[name] = dict(module.__dict__[name])
    return copied
