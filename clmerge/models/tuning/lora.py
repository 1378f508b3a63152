"""LoRA: frozen weights plus a trained product of two thin factors, in linear layers and attention."""

import re
from collections.abc import Collection, Mapping

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from clmerge.models.backbone import Backbone
from clmerge.models.tuning.adapted import adapt
from clmerge.models.tuning.low_rank import LoRALinear, LoRAMultiheadAttention, LowRank
from clmerge.models.tuning.tuning import Tuning
from clmerge.weights.factored import Product
from clmerge.weights.parametrization import parametrized
from clmerge.weights.selection import select_parameters
from clmerge.weights.swap import assign

BLOCKS = r"\.(attn|mlp)\."
"""Matches the linear maps of a transformer's blocks by the names of open_clip and timm."""

_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_PATCHES = "patch_embed"


class LoRA(Tuning):
    r"""Train low-rank changes of the linear maps, everything else frozen (Hu et al., arXiv:2106.09685).

    Task vectors are those of the dense weights, so every merger applies. A task starts with fresh factors and B = 0.

    Args:
        rank: Rank of every change. The three maps in a packed input projection of ``nn.MultiheadAttention`` (open_clip)
            have one each; timm's ``qkv`` is one linear layer and has one for all three, as with PEFT.
        alpha: The change is ``alpha / rank * B A``; default the rank, a factor of 1.
        targets: Regular expression that is searched in the names of the weights, within what ``Full`` trains; default
            all linear maps of attention and MLP. ``attn\.(in_proj|qkv)`` is the input projections alone.

    Raises:
        ValueError: For a rank below 1, or a target that matches no linear map.
    """

    def __init__(self, *, rank: int = 8, alpha: float | None = None, targets: str = BLOCKS) -> None:
        self.rank = rank
        self.alpha = float(rank) if alpha is None else alpha
        self.targets = targets

    @override
    def apply(self, backbone: Backbone) -> None:
        offered = select_parameters(backbone.model, backbone.default_trainable)
        backbone.requires_grad_(False)
        add_lora(backbone.model, self.targets, rank=self.rank, alpha=self.alpha, among=offered)


def add_lora(
    module: nn.Module,
    targets: str,
    *,
    rank: int = 8,
    alpha: float | None = None,
    among: Collection[str] | None = None,
) -> list[str]:
    """Add trainable low-rank factors to weights of a module, in place; these weights are frozen, others unchanged.

    Weights of ``nn.Linear`` and ``nn.MultiheadAttention`` can have factors (not those of their subclasses, whose
    forward is unknown). Patch embeddings get factors only if ``targets`` contains ``patch_embed``. B starts at zero,
    so the output does not change at first.

    Args:
        module: Any module, before it is compiled or wrapped.
        targets: Regular expression that is searched in the names of weights (``attn.out_proj.weight``).
        rank: Rank of every change.
        alpha: The change is ``alpha / rank * B A``; default the rank.
        among: Names of the only weights to consider.

    Returns:
        Names of the weights with factors.

    Raises:
        ValueError: If ``targets`` is not a regular expression, matches no such weight, or matches one that several
            modules share; for a rank below 1.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> add_lora(net, "^0", rank=1)
        ['0.weight']
        >>> [name for name, parameter in net.named_parameters() if parameter.requires_grad]
        ['0.bias', '0.lora_A_weight', '0.lora_B_weight', '1.weight', '1.bias']
    """
    if rank < 1:
        raise ValueError(f"expected a rank of 1 or more, got {rank}")
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise ValueError(f"expected a regular expression for targets, got {targets!r}: {error}") from error
    possible = _possible(module)
    chosen = [
        name
        for name in possible
        if pattern.search(name) and (among is None or name in among) and (_PATCHES not in name or _PATCHES in targets)
    ]
    if not chosen:
        shown = ", ".join(map(repr, [name for name in possible if among is None or name in among][:4])) or "none"
        raise ValueError(
            f"expected targets that match a linear map of {type(module).__name__}, got {targets!r}; its linear maps "
            f"are {shown} and so on"
        )
    holders: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for name in chosen:
        if len(shared := holders[id(module.get_parameter(name))]) > 1:
            raise ValueError(f"expected targets that no two modules share, got {shared}; leave them out of targets")
    for name in chosen:
        layer, own = possible[name]
        if not isinstance(layer, LowRank):
            adapted = adapt(layer, LoRALinear if type(layer) in _LINEAR else LoRAMultiheadAttention)
            adapted.lora_weights = ()
            adapted.lora_scale = (rank if alpha is None else alpha) / rank
        assert isinstance(layer, LowRank)
        layer.add_factors(own, rank)
    for layer in {id(layer): layer for layer, _ in (possible[name] for name in chosen)}.values():
        assert isinstance(layer, LowRank)
        layer.renew(None)
    return chosen


def get_adapter(module: nn.Module) -> dict[str, Product]:
    """Return the factors of a module by weight name; the tensors are not copied."""
    found: dict[str, Product] = {}
    for prefix, part in parametrized(module).items():
        if isinstance(part, LowRank):
            found |= {prefix + name: Product(*part.factors(name), part.lora_scale) for name in part.names()}
    return found


def set_adapter(module: nn.Module, adapter: Mapping[str, Product]) -> list[str]:
    """Add the factors of an adapter to weights of a module, in place; they can be trained further.

    Args:
        module: A module whose named weights have no factors yet.
        adapter: Factors by weight name, from an adapter file or a merge of several.

    Returns:
        Names of the weights with factors.

    Raises:
        ValueError: If a weight is missing, has another shape or already has factors; the module is unchanged then.
    """
    possible = _possible(module)
    for name, found in adapter.items():
        shape = tuple(module.get_parameter(name).shape) if name in possible else "no such linear map"
        if shape != found.shape:
            raise ValueError(
                f"expected {name!r} of shape {found.shape} in {type(module).__name__}, as the adapter has it, got "
                f"{shape}; load it into the model it was made for"
            )
    for name, found in adapter.items():
        rank = found.a.shape[-2]
        add_lora(module, f"^{re.escape(name)}$", rank=rank, alpha=found.scale * rank, among=[name])
        layer, own = possible[name]
        assert isinstance(layer, LowRank)
        a, b = layer.factors(own)
        # All slices of a packed projection share A if the adapter has one product for the whole projection.
        assign({"a": a, "b": b}, {"a": found.a.expand(a.shape), "b": found.b.reshape(b.shape)})
    return list(adapter)


def _possible(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return weight name -> layer and name in the layer, for all weights that can have factors."""
    found = {}
    for prefix, part in module.named_modules():
        own = ("weight",) if type(part) in _LINEAR else _PROJECTIONS if type(part) is nn.MultiheadAttention else ()
        for name in own:
            if part._parameters.get(name) is not None:
                found[f"{prefix}.{name}" if prefix else name] = (part, name)
    return found
