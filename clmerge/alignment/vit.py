"""Specifications of vision transformers of open_clip and timm."""

import re
from collections.abc import Iterable
from typing import Any

from clmerge.alignment.spec import Axis, Group, PermutationSpec


class _Axes:
    """Axes by group, for the parameters that a module has."""

    def __init__(self, module: Any) -> None:
        both = (*module.named_parameters(), *module.named_buffers())
        self.own = dict(both)
        self.groups: dict[str, list[Axis]] = {}

    def add(self, group: str, axis: int, names: Iterable[str], *, reads: bool = False) -> None:
        for name in names:
            if name in self.own:
                self.groups.setdefault(group, []).append(Axis(name, axis, reads=reads))

    def part(self, group: str, axis: int, name: str, part: int, parts: int, *, reads: bool = False) -> None:
        for key in (f"{name}weight", f"{name}bias"):
            if key in self.own:
                self.groups.setdefault(group, []).append(Axis(key, axis, part, parts, reads=reads))

    def size(self, group: str) -> int:
        axis = self.groups[group][0]
        return int(self.own[axis.name].shape[axis.axis]) // axis.parts

    def spec(self, heads: dict[str, tuple[int, str, bool]], fixed: Iterable[str], outputs: str) -> PermutationSpec:
        groups = {}
        for key, axes in self.groups.items():
            count, order, rigid = heads.get(key, (0, "", False))
            groups[key] = Group(self.size(key), tuple(axes), count, order, rigid)
        return PermutationSpec(groups, tuple(name for name in fixed if name in self.own), outputs)


def _both(*names: str) -> list[str]:
    return [f"{name}.{key}" for name in names for key in ("weight", "bias")]


def open_clip_spec(module: Any) -> PermutationSpec:
    """Return the specification of open_clip's ``VisionTransformer``; its features, behind ``proj``, stay in order.

    Args:
        module: The image tower.
    """
    axes = _Axes(module)
    heads: dict[str, tuple[int, str, bool]] = {}
    residual = "residual"
    axes.add(residual, 0, ["conv1.weight", "class_embedding", *_both("ln_pre", "ln_post")])
    axes.add(residual, 1, ["positional_embedding"])
    axes.add(residual, 0, ["proj"], reads=True)
    for index, block in enumerate(module.transformer.resblocks):
        name = f"transformer.resblocks.{index}."
        if type(block).__name__ != "ResidualAttentionBlock" or type(block.attn).__name__ != "MultiheadAttention":
            raise ValueError(
                f"expected open_clip's plain attention blocks, got {type(block).__name__} with "
                f"{type(block.attn).__name__} at {name.rstrip('.')!r}: their symmetries are not known here"
            )
        axes.add(residual, 0, [name + key for key in _both("ln_1", "ln_2")])
        axes.add(residual, 0, [f"{name}attn.out_proj.weight", f"{name}attn.out_proj.bias"])
        axes.add(residual, 0, [f"{name}mlp.c_proj.weight", f"{name}mlp.c_proj.bias"])
        axes.add(residual, 0, [f"{name}ls_1.gamma", f"{name}ls_2.gamma"])
        axes.add(residual, 1, [f"{name}attn.in_proj_weight", f"{name}mlp.c_fc.weight"], reads=True)
        axes.add(f"blocks.{index}.mlp", 0, _both(f"{name}mlp.c_fc"))
        axes.add(f"blocks.{index}.mlp", 1, [f"{name}mlp.c_proj.weight"], reads=True)
        query, value = f"blocks.{index}.qk", f"blocks.{index}.vo"
        axes.part(query, 0, f"{name}attn.in_proj_", 0, 3)
        axes.part(query, 0, f"{name}attn.in_proj_", 1, 3, reads=True)
        axes.part(value, 0, f"{name}attn.in_proj_", 2, 3)
        axes.add(value, 1, [f"{name}attn.out_proj.weight"], reads=True)
        number = int(block.attn.num_heads)
        heads |= {query: (number, f"blocks.{index}", False), value: (number, f"blocks.{index}", False)}
    return axes.spec(heads, (), "" if "proj" in axes.own else residual)


def timm_vit_spec(module: Any) -> PermutationSpec:
    """Return the specification of timm's ``VisionTransformer``, with or without attention pooling and classifier.

    Args:
        module: The network.
    """
    axes = _Axes(module)
    heads: dict[str, tuple[int, str, bool]] = {}
    residual = "residual"
    axes.add(residual, 0, _both("patch_embed.proj", "norm_pre", "norm", *([] if _pools(module) else ["fc_norm"])))
    axes.add(residual, 2, ["cls_token", "reg_token", "pos_embed"])
    for index, block in enumerate(module.blocks):
        name = f"blocks.{index}."
        if not (type(block).__name__ == "Block" and type(block.attn).__name__ == "Attention"):
            raise ValueError(
                f"expected timm's plain attention blocks, got {type(block).__name__} with {type(block.attn).__name__} "
                f"at {name.rstrip('.')!r}: their symmetries are not known here"
            )
        axes.add(residual, 0, [name + key for key in _both("norm1", "norm2", "attn.proj", "mlp.fc2")])
        axes.add(residual, 0, [f"{name}ls1.gamma", f"{name}ls2.gamma"])
        axes.add(residual, 1, [f"{name}attn.qkv.weight", f"{name}mlp.fc1.weight"], reads=True)
        axes.add(f"{name}mlp", 0, [name + key for key in _both("mlp.fc1", "mlp.norm")])
        axes.add(f"{name}mlp", 1, [f"{name}mlp.fc2.weight"], reads=True)
        query, value = f"{name}qk", f"{name}vo"
        axes.part(query, 0, f"{name}attn.qkv.", 0, 3)
        axes.part(query, 0, f"{name}attn.qkv.", 1, 3, reads=True)
        axes.part(value, 0, f"{name}attn.qkv.", 2, 3)
        axes.add(value, 1, [f"{name}attn.proj.weight"], reads=True)
        heads |= _heads(axes, block.attn, name, query, value)
    outputs = residual
    if _pools(module):
        outputs = "pool.out"
        pool = "attn_pool."
        axes.add(residual, 1, [f"{pool}kv.weight"], reads=True)
        axes.add("pool.latent", 2, [f"{pool}latent"])
        axes.add("pool.latent", 1, [f"{pool}q.weight"], reads=True)
        axes.part("pool.qk", 0, f"{pool}q.", 0, 1)
        axes.part("pool.qk", 0, f"{pool}kv.", 0, 2, reads=True)
        axes.part("pool.vo", 0, f"{pool}kv.", 1, 2)
        axes.add("pool.vo", 1, [f"{pool}proj.weight"], reads=True)
        heads |= _heads(axes, module.attn_pool, pool, "pool.qk", "pool.vo")
        axes.add("pool.mlp", 0, _both(f"{pool}mlp.fc1"))
        axes.add("pool.mlp", 1, [f"{pool}mlp.fc2.weight"], reads=True)
        axes.add("pool.out", 0, _both(f"{pool}proj", f"{pool}norm", f"{pool}mlp.fc2", "fc_norm"))
        axes.add("pool.out", 1, [f"{pool}mlp.fc1.weight"], reads=True)
    if "head.weight" in axes.own:
        axes.add(outputs, 1, ["head.weight"], reads=True)
        outputs = ""
    # Norms of queries and keys are over the units of one head and shared by all heads: these stay where they are.
    fixed = [name for name in axes.own if re.search(r"\.(q_norm|k_norm)\.(weight|bias)$", name)]
    return axes.spec(heads, ["head.bias", *fixed], outputs)


def _pools(module: Any) -> bool:
    return getattr(module, "attn_pool", None) is not None


def _heads(axes: _Axes, attention: Any, name: str, query: str, value: str) -> dict[str, tuple[int, str, bool]]:
    """Return number of heads, name of their order, and whether units within a head stay, for two groups."""
    order, number = name.rstrip("."), int(attention.num_heads)
    prefix = name if name.startswith("attn_pool") else f"{name}attn."
    rigid = any(key.startswith((f"{prefix}q_norm.", f"{prefix}k_norm.")) for key in axes.own)
    if int(attention.head_dim) * number != axes.size(query):
        raise ValueError(f"expected heads that divide {axes.size(query)} units, got {number} at {order!r}")
    return {query: (number, order, rigid), value: (number, order, False)}
