"""Layers that get additional trained parameters in place, without being replaced in their model."""

from typing import ClassVar, TypeVar, cast

from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from clmerge.weights.parametrized import Parametrized

Kind = TypeVar("Kind", bound="Adapted")


class Adapted(Parametrized):
    """A layer whose weights are computed from frozen weights, which keep their names, and inner parameters.

    Not constructed: ``adapt`` changes the class of a layer in place; the layer keeps its parameters, hooks and mode.
    ``layer.weight`` is the computed weight, so code that reads the weight instead of calling the layer
    (``nn.MultiheadAttention`` with its output projection, timm's EVA) also trains the inner parameters.

    Attributes:
        plain_class: The original class of the layer.
        settings: Names of the attributes that adapting adds to the layer.
    """

    answers_for_children = False
    shardable = False
    settings: ClassVar[tuple[str, ...]] = ()
    plain_class: type[nn.Module]

    @override
    def folded(self) -> nn.Module:
        plain = _shallow_copy(self)
        plain.__class__ = self.plain_class
        for name in self.inner():
            del plain._parameters[name]
        for name in ("plain_class", *self.settings):
            del plain.__dict__[name]
        for name, tensor in self.dense().items():
            plain._parameters[name] = nn.Parameter(tensor.detach())
        return plain

    def own(self, name: str) -> nn.Parameter:
        """Return a stored parameter, not the weight computed from it."""
        parameter = self._parameters[name]
        assert parameter is not None
        return parameter


def adapt(layer: nn.Module, kind: type[Kind]) -> Kind:
    """Change the class of a layer in place."""
    plain = type(layer)
    layer.__class__ = kind
    adapted = cast(Kind, layer)
    adapted.plain_class = plain
    return adapted


class OpenAttention(nn.MultiheadAttention):
    """Multi-head attention that reads each of its weights once, because reading may compute them."""

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
        """Attend, as ``nn.MultiheadAttention`` does without its fast path."""
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


def _shallow_copy(module: nn.Module) -> nn.Module:
    """Return a new module that shares parameters, buffers, children and hooks with the original."""
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        copied.__dict__[name] = dict(module.__dict__[name])
    return copied
