"""Fisher information of mask nodes: one number per attention head and per hidden feature of a transformer."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from clmerge.statistics.collectors import Batch, chosen_parameters, mean_of_squares

_FEED_FORWARD = (("c_fc", "c_proj"), ("fc1", "fc2"), ("linear1", "linear2"))  # open_clip; timm; torch.nn
_PACKED = re.compile(r"(in_proj_|qkv\.)")
_BY_HEAD = re.compile(r"[qk]_proj")
_AROUND = re.compile(r"(?:ln|norm|ls|gamma)_?([12])\b")  # norms and scales of the first and the second half of a layer


@dataclass(frozen=True)
class _Layer:
    """One layer of a transformer.

    Attributes:
        name: Name of the layer.
        attention: Name of its attention module.
        num_heads: Number of heads.
        projection: Name of the attention's output projection.
        widen: Name of the linear map to the hidden features.
        narrow: Name of the linear map from the hidden features.
    """

    name: str
    attention: str
    num_heads: int
    projection: str
    widen: str
    narrow: str


def mask_node_fisher(
    module: nn.Module,
    batches: Iterable[Batch],
    parameters: Sequence[str] | None = None,
    *,
    labels: Literal["model", "true", "sampled"] = "model",
    chunk_size: int = 4,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return, for every parameter, the Fisher information of the mask nodes it belongs to (arXiv 2403.09891).

    A mask node is a factor of value 1 on one head's input to the output projection of an attention, or on one hidden
    feature of a feed-forward network. Its Fisher information is the mean over examples of ``(d log p / d mask)^2``.
    Parameters are assigned information as in the authors' code:

    - rows of the query and key projections: that of their head;
    - values and the output projection: the mean over the heads;
    - rows of the map to the hidden features: that of their feature;
    - rows of the map from the hidden features: the mean over the features;
    - norms and scales: the mean of the half of the layer they belong to;
    - parameters in no layer, such as embeddings: the mean over the layers of both means together.

    No hook is needed: the derivative for a factor on an input of ``y = W x`` is the sum over the outputs of ``W * dW``.

    The authors use true labels, and square the gradient of a batch instead of that of an example.

    Args:
        module: A classifier as for ``diagonal_fisher``, with transformer layers as open_clip, timm and
            ``nn.TransformerEncoderLayer`` build them. Not compiled.
        batches: Inputs (batch, ...), or tuples of inputs and class labels (batch,), indices of the logits.
        parameters: Names in ``module.named_parameters()``. Default: those that are trainable. Layers without any of
            them are ignored.
        labels: As for ``diagonal_fisher``.
        chunk_size: Examples at a time.
        seed: Seeds ``"sampled"``.

    Returns:
        Information by name, in the shapes of the parameters; expanded views of few numbers each.

    Raises:
        ValueError: If there is no such layer, or as for ``diagonal_fisher``.
    """
    chosen = chosen_parameters(module, parameters)
    layers = [layer for layer in _layers(module) if any(name.startswith(f"{layer.name}.") for name in chosen)]
    if not layers:
        raise ValueError(
            f"expected parameters in layers of a transformer as open_clip or timm build them, got none in "
            f"{type(module).__name__}; use Fisher"
        )
    read = [f"{name}.weight" for layer in layers for name in (layer.projection, layer.narrow)]
    weights = chosen_parameters(module, read)

    def nodes(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for layer in layers:
            of_inputs, of_hidden = (
                (gradients[f"{name}.weight"] * weights[f"{name}.weight"]).sum(dim=1)
                for name in (layer.projection, layer.narrow)
            )
            found[layer.attention] = of_inputs.reshape(len(of_inputs), layer.num_heads, -1).sum(dim=2)
            found[layer.narrow] = of_hidden
        return found

    fisher = mean_of_squares(module, batches, weights, of=nodes, labels=labels, chunk_size=chunk_size, seed=seed)
    everywhere = torch.stack([fisher[layer.attention].mean() + fisher[layer.narrow].mean() for layer in layers]).mean()
    spread = {}
    for name, tensor in chosen.items():
        own = next((layer for layer in layers if name.startswith(f"{layer.name}.")), None)
        information = None
        if own is not None:
            information = _of_layer(name, len(tensor) if tensor.ndim else 1, own, fisher)
        rows = everywhere.view(1) if information is None else information
        spread[name] = rows.view(-1, *[1] * (tensor.ndim - 1)).expand(tensor.shape) if tensor.ndim else rows[0]
    return spread


def _of_layer(name: str, num_rows: int, layer: _Layer, fisher: dict[str, Tensor]) -> Tensor | None:
    """Return the information of a parameter's rows, or one number for all; None if it belongs to neither half."""
    heads, hidden = fisher[layer.attention], fisher[layer.narrow]
    if name.startswith(f"{layer.attention}."):
        inner = name.removeprefix(f"{layer.attention}.")
        if _PACKED.match(inner):
            size = num_rows // 3
            by_head = heads.repeat_interleave(size // layer.num_heads)
            return torch.cat([by_head, by_head, heads.mean().expand(size)])
        if _BY_HEAD.match(inner):
            return heads.repeat_interleave(num_rows // layer.num_heads)
        return heads.mean().view(1)
    if name.startswith(f"{layer.widen}."):
        return hidden.repeat(num_rows // len(hidden))  # a gate and its values come one after the other
    if name.startswith(f"{layer.narrow}."):
        return hidden.mean().view(1)
    half = _AROUND.search(name.removeprefix(layer.name))
    return None if half is None else (heads if half[1] == "1" else hidden).mean().view(1)


def _layers(module: nn.Module) -> list[_Layer]:
    """Find the layers: an attention with heads and an output projection, and a feed-forward network beside it."""
    modules = dict(module.named_modules())
    found = []
    for attention, candidate in modules.items():
        num_heads = getattr(candidate, "num_heads", None)
        name = attention.rpartition(".")[0]
        projection = next((f"{attention}.{n}" for n in ("out_proj", "proj") if f"{attention}.{n}" in modules), None)
        pair = next(
            (
                (inner, f"{inner.removesuffix(first)}{second}")
                for first, second in _FEED_FORWARD
                for inner in modules
                if inner.startswith(f"{name}.") and inner.endswith(f".{first}")
                if f"{inner.removesuffix(first)}{second}" in modules
            ),
            None,
        )
        if isinstance(num_heads, int) and name and projection is not None and pair is not None:
            found.append(_Layer(name, attention, num_heads, projection, *pair))
    return found
