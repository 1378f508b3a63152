"""Bottleneck adapters: a small network after the MLP of every block, which stays part of the model."""

import re
from collections.abc import Collection

from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from clmerge.models.backbone import Backbone
from clmerge.models.tuning.tuning import Tuning
from clmerge.weights.selection import select_parameters

_LAST = re.compile(r"mlp\.(fc2|c_proj|w3)$")


class AdapterLinear(nn.Linear):
    """A linear layer followed by a bottleneck: ``y + up(gelu(down(y)))`` for its output ``y``.

    ``adapter_down``, ``adapter_up`` and their biases are ordinary parameters: they are trained, merged and saved
    under their own names.
    """

    adapter_down: nn.Parameter
    adapter_down_bias: nn.Parameter
    adapter_up: nn.Parameter
    adapter_up_bias: nn.Parameter

    def add_bottleneck(self, width: int) -> None:
        """Add a bottleneck whose output is zero at first."""
        down = nn.Linear(self.out_features, width)  # PyTorch's initialisation
        for name, tensor in (
            ("down", down.weight),
            ("down_bias", down.bias),
            ("up", down.weight.new_zeros(self.out_features, width)),
            ("up_bias", down.weight.new_zeros(self.out_features)),
        ):
            self.register_parameter(f"adapter_{name}", nn.Parameter(tensor.detach().to(self.weight)))

    @override
    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        hidden = functional.gelu(functional.linear(output, self.adapter_down, self.adapter_down_bias))
        return output + functional.linear(hidden, self.adapter_up, self.adapter_up_bias)


class Adapters(Tuning):
    """Train a bottleneck after the MLP of every block, everything else frozen (arXiv:1902.00751, arXiv:2005.00247).

    A bottleneck cannot be folded into existing weights, so its own parameters are merged and are part of the final
    model, which loads into the backbone after ``add_adapters``.

    Args:
        width: Hidden features of the bottleneck.

    Raises:
        ValueError: For a width below 1, or a backbone without MLPs as open_clip and timm name them.
    """

    def __init__(self, *, width: int = 16) -> None:
        self.width = width

    @override
    def apply(self, backbone: Backbone) -> None:
        offered = select_parameters(backbone.model, backbone.default_trainable)
        backbone.requires_grad_(False)
        add_adapters(backbone.model, width=self.width, among=offered)


def add_adapters(module: nn.Module, *, width: int = 16, among: Collection[str] | None = None) -> list[str]:
    """Add a trainable bottleneck after the MLP of every block, in place; other layers are unchanged.

    Args:
        module: Any module, before it is compiled or wrapped.
        width: Hidden features of the bottleneck.
        among: Names of the only weights to consider; bottlenecks follow ``mlp.fc2``, ``mlp.c_proj`` and ``mlp.w3``.

    Returns:
        Names of the layers with a bottleneck.

    Raises:
        ValueError: For a width below 1, or if there is no such layer.

    Example:
        >>> block = nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)})})
        >>> add_adapters(block, width=2)
        ['mlp.fc2']
    """
    if width < 1:
        raise ValueError(f"expected a width of 1 or more, got {width}")
    found = []
    for name, layer in module.named_modules():
        if type(layer) is nn.Linear and _LAST.search(name) and (among is None or f"{name}.weight" in among):
            layer.__class__ = AdapterLinear
            assert isinstance(layer, AdapterLinear)
            layer.add_bottleneck(width)
            found.append(name)
    if not found:
        raise ValueError(f"expected MLPs in {type(module).__name__} as open_clip and timm name them, got none")
    return found
