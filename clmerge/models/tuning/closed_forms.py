"""Forward-mode derivatives of transformer layers in closed form, the most expensive part of a tangent model.

Every function here computes PyTorch's function of the same name on dual tensors (``torch.autograd.forward_ad``).
Only the weights' tangents are trained, so the formulas are arranged for reverse mode over them: two matrix products
more than the plain forward pass, two in the backward pass, and one saved input per layer. PyTorch's own rules multiply
the images of a batch one by one if the input is not contiguous and the weight is frozen, save several intermediate
results of a normalisation, and do not exist for fused attention. This is the closed form of Tangent Transformers
(arXiv 2307.08122), per function instead of per architecture.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from typing_extensions import override

Part = Tensor | None


def load_forward_mode() -> None:
    """Load PyTorch's forward mode, which at first use warns about deprecated code of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


def split(tensor: Part) -> tuple[Any, Part]:
    """Return value and tangent of a dual tensor; the tangent is None where it is zero by construction."""
    if tensor is None:
        return None, None
    value, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return value, tangent


def total(*tangents: Part) -> Part:
    """Return the sum of the tangents that are not None, or None."""
    given = [tangent for tangent in tangents if tangent is not None]
    return sum(given[1:], start=given[0]) if given else None


def join(value: Tensor, *tangents: Part) -> Tensor:
    """Return the dual tensor of a value and the sum of its tangents; ``value`` itself if it has none."""
    tangent = total(*tangents)
    if tangent is None:
        return value
    # Under autocast a bias has a wider dtype than the product that it is added to.
    tangent = tangent.to(value.dtype).expand_as(value)
    dual: Tensor = forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return dual


def linear(input: Tensor, weight: Tensor, bias: Part = None) -> Tensor:
    """``x W' + b``: the tangent is ``dx W' + x dW' + db``, of inputs of shape ``(..., in)``."""
    (x, dx), (w, dw), (b, db) = split(input), split(weight), split(bias)
    # As matrices: with a frozen weight PyTorch would multiply a batch that is not contiguous image by image.
    rows = x.reshape(-1, x.shape[-1])
    value = F.linear(rows, w, b)
    tangent = None
    if dw is not None:
        tangent = F.linear(rows, dw, db)
    elif db is not None:
        tangent = db.expand_as(value)
    if dx is not None:
        d_rows = dx.reshape(-1, dx.shape[-1])
        tangent = F.linear(d_rows, w) if tangent is None else torch.addmm(tangent, d_rows, w.t())
    shape = (*x.shape[:-1], w.shape[0])
    return join(value.view(shape), None if tangent is None else tangent.view(shape))


def conv2d(input: Tensor, weight: Tensor, bias: Part = None, *args: Any, **kwargs: Any) -> Tensor:
    """A convolution; as for ``linear``, it is linear in input and weight."""
    (x, dx), (w, dw), (b, db) = split(input), split(weight), split(bias)
    value = F.conv2d(x, w, b, *args, **kwargs)
    of_weight = None if dw is None else F.conv2d(x, dw, db, *args, **kwargs)
    of_bias = db[:, None, None] if dw is None and db is not None else None
    of_input = None if dx is None else F.conv2d(dx, w, None, *args, **kwargs)
    return join(value, of_weight, of_bias, of_input)


def layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Part = None, bias: Part = None, eps: float = 1e-5
) -> Tensor:
    """``n(x) w + b``: the tangent is ``w (d - mean(d) - n mean(n d)) + n dw + db`` with ``d = dx / std(x)``."""
    (x, dx), (w, dw), (b, db) = split(input), split(weight), split(bias)
    value = F.layer_norm(x, normalized_shape, w, b, eps)
    if dx is None and dw is None:
        return join(value, db)
    axes = tuple(range(-len(normalized_shape), 0))
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(axes, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    normal = centred * inverse
    tangent = db
    if dw is not None:
        tangent = normal * dw if db is None else torch.addcmul(db, normal, dw)
    if dx is None:
        return join(value, tangent)
    d = dx * inverse
    d = torch.addcmul(d - d.mean(axes, keepdim=True), normal, (normal * d).mean(axes, keepdim=True), value=-1)
    if w is None:
        return join(value, d, tangent)
    return join(value, d * w if tangent is None else torch.addcmul(tangent, d, w))


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """``x Phi(x)``: the tangent is ``dx`` times the derivative, the only saved tensor."""
    x, dx = split(input)
    value = F.gelu(x, approximate=approximate)
    if dx is None:
        return value
    return join(value, dx * torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate=approximate))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Part = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(q k') v`` with explicit probabilities ``p``.

    The tangent is ``dp v + p dv`` with ``ds = dq k' + q dk'`` and ``dp = p (ds - sum(p ds))``.
    """
    if enable_gqa:
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no forward-mode derivative
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True
            )
    (q, dq), (k, dk), (v, dv), (mask, ds) = split(query), split(key), split(value), split(attn_mask)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    q = q * factor
    scores = q @ k.transpose(-2, -1)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    p = scores.softmax(dim=-1)
    dropped = F.dropout(torch.ones_like(p), dropout_p) if dropout_p else None
    kept = p if dropped is None else p * dropped
    tangent = None if dv is None else kept @ dv
    ds = total(ds, None if dq is None else (dq * factor) @ k.transpose(-2, -1), None if dk is None else q @ dk.mT)
    if ds is not None:
        dp = p * ds
        dp = dp - p * dp.sum(dim=-1, keepdim=True)
        tangent = total(tangent, (dp if dropped is None else dp * dropped) @ v)
    return join(kept @ v, tangent)


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    in_proj_weight: Tensor,
    in_proj_bias: Part,
    bias_k: Part,
    bias_v: Part,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Part,
    training: bool = True,
    key_padding_mask: Part = None,
    need_weights: bool = True,
    attn_mask: Part = None,
    **others: Any,
) -> tuple[Tensor, Part]:
    """``nn.MultiheadAttention`` as self-attention of a batch ``(length, batch, embed_dim)``, by the rules above.

    Any other use of attention runs PyTorch's own code and rules.
    """
    alone = query is key and key is value and query.dim() == 3
    extra = bias_k is not None or add_zero_attn or key_padding_mask is not None or need_weights
    if not alone or extra or others.get("use_separate_proj_weight") or (attn_mask is not None and attn_mask.dim() > 2):
        with sdpa_kernel(SDPBackend.MATH):
            result: tuple[Tensor, Part] = F.multi_head_attention_forward(
                query, key, value, embed_dim, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v,
                add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training, key_padding_mask, need_weights,
                attn_mask, **others,
            )  # fmt: skip
            return result
    length, batch, _ = query.shape
    projected = linear(query.transpose(0, 1), in_proj_weight, in_proj_bias)
    q, k, v = projected.view(batch, length, 3, num_heads, embed_dim // num_heads).permute(2, 0, 3, 1, 4).unbind()
    mixed = attention(q, k, v, attn_mask, dropout_p if training else 0.0)
    return linear(mixed.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias).transpose(0, 1), None


RULES: Mapping[Any, Callable[..., Any]] = {
    F.linear: linear,
    F.conv2d: conv2d,
    F.layer_norm: layer_norm,
    F.gelu: gelu,
    F.scaled_dot_product_attention: attention,
    F.multi_head_attention_forward: multi_head_attention,
}


class ClosedForms(TorchFunctionMode):
    """A mode in which functions with a rule above use that rule, and others PyTorch's forward mode.

    It also disables the fast path of ``nn.MultiheadAttention``, which has no derivatives.
    """

    @override
    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return RULES.get(func, func)(*args, **(kwargs or {}))
