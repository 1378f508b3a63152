"""LoRA: frozen weights plus a trained product of two thin factors, in linear layers and attention."""

import re
from collections.abc import Collection

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from clmerge.models.backbone import Backbone
from clmerge.models.tuning.adapted import adapt
from clmerge.models.tuning.low_rank import LoRALinear, LoRAMultiheadAttention, LowRank
from clmerge.models.tuning.tuning import Tuning
from clmerge.weights.selection import select_parameters

BLOCKS = r"\.(attn|mlp)\."
"""The linear maps of a transformer's blocks, as open_clip and timm call them."""

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
    """Give weights of a module trainable low-rank factors, in place; these weights are frozen, the rest is left alone.

    Weights of ``nn.Linear`` and ``nn.MultiheadAttention`` can have factors (not those of their subclasses, whose
    forward is unknown). Patch embeddings only do if ``targets`` says ``patch_embed``. B starts at zero: nothing
    changes at first.

    Args:
        module: Any module, before it is compiled or wrapped.
        targets: Regular expression that is searched in the names of weights (``attn.out_proj.weight``).
        rank: Rank of every change.
        alpha: The change is ``alpha / rank * B A``; default the rank.
        among: Names of the only weights to consider.

    Returns:
        Names of the weights that have factors now.

    Raises:
        ValueError: If ``targets`` is no regular expression, matches no such weight, or matches one that several
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


def _possible(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Weight name -> layer and the weight's name in it, of all weights that can have factors."""
    found = {}
    for prefix, part in module.named_modules():
        own = ("weight",) if type(part) in _LINEAR else _PROJECTIONS if type(part) is nn.MultiheadAttention else ()
        for name in own:
            if part._parameters.get(name) is not None:
                found[f"{prefix}.{name}" if prefix else name] = (part, name)
    return found
