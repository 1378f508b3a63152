"""(IA)^3: a trained factor for every key, value and hidden feature, folded exactly into the weights."""

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from clmerge.models.backbone import Backbone
from clmerge.models.tuning.adapted import Adapted, OpenAttention, adapt
from clmerge.models.tuning.tuning import Tuning
from clmerge.weights.selection import select_parameters
from clmerge.weights.task_vector import State, apply_task_vector

_KEYS_AND_VALUES = re.compile(r"attn\.(qkv|k_proj|v_proj)$")
_AFTER_HIDDEN = re.compile(r"mlp\.(fc2|c_proj|w3)$")


class Rescaled(Adapted):
    """A layer whose features are multiplied by ``1 + ia3``, with ``ia3`` trained from zero (arXiv:2205.05638).

    With training from zero, weight decay pulls towards the base model instead of towards zero features.

    Attributes:
        ia3: Factors minus 1, of the last outputs or of all inputs.
    """

    ia3: nn.Parameter
    ia3_of_inputs: bool

    settings = ("ia3_of_inputs",)

    @override
    def names(self) -> list[str]:
        weight = "in_proj_weight" if isinstance(self, nn.MultiheadAttention) else "weight"
        bias = weight.replace("weight", "bias")
        return [weight] if self.ia3_of_inputs or self._parameters.get(bias) is None else [weight, bias]

    @override
    def inner(self) -> list[str]:
        return ["ia3"]

    def rescaled(self, name: str) -> Any:
        """Return a weight or bias with its factors applied."""
        stored = self._parameters.get(name)
        if stored is None or name not in self.names():
            return stored
        if self.ia3_of_inputs:
            return stored + stored * self.ia3
        return stored + stored * self._of_outputs(len(stored)).reshape(-1, *(1,) * (stored.ndim - 1))

    def _of_outputs(self, size: int) -> Tensor:
        """Return ``ia3`` for all outputs: zero for the queries, which come first."""
        return functional.pad(self.ia3, (size - len(self.ia3), 0))

    @override
    def dense(self) -> dict[str, Tensor]:
        return {name: self.rescaled(name) for name in self.names()}

    @override
    def state(self, base: State, tau: State) -> dict[str, Tensor]:
        with torch.no_grad():
            others = {name: tensor.clone() for name, tensor in self.dense().items() if name not in base}
        return {**others, **apply_task_vector(base, tau), "ia3": torch.zeros_like(self.ia3).detach()}

    @override
    @torch.no_grad()
    def renew(self, generator: torch.Generator | None) -> None:
        """Multiply the factors into the weights and reset them to 1; nothing is drawn."""
        for name, tensor in self.dense().items():
            self.own(name).copy_(tensor)
        self.ia3.zero_()

    def add_factors(self, size: int, *, of_inputs: bool) -> None:
        """Freeze the weights and add ``size`` factors."""
        self.ia3_of_inputs = of_inputs
        for name in self.names():
            self.own(name).requires_grad_(False)
        self.register_parameter("ia3", nn.Parameter(self.own(self.names()[0]).new_zeros(size)))


class IA3Linear(Rescaled, nn.Linear):
    """A linear layer with factors on its inputs or its last outputs."""

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The weight, factors included."""
        return self.rescaled("weight")

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """The bias, factors included."""
        return self.rescaled("bias")

    @override
    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.own("weight"), self._parameters["bias"]
        if self.ia3_of_inputs:
            return functional.linear(input + input * self.ia3, weight, bias)
        output = functional.linear(input, weight, bias)
        return output + output * self._of_outputs(output.shape[-1])


class IA3MultiheadAttention(Rescaled, OpenAttention):
    """An attention layer with factors on its keys and values."""

    @property
    def in_proj_weight(self) -> Any:  # type: ignore[override]
        """The packed input projections, factors included."""
        return self.rescaled("in_proj_weight")

    @property
    def in_proj_bias(self) -> Any:  # type: ignore[override]
        """Their biases, factors included."""
        return self.rescaled("in_proj_bias")


class IA3(Tuning):
    """Train factors of keys, values and hidden features of the MLPs, everything else frozen (arXiv:2205.05638).

    A few thousand parameters for a ViT-B. Task vectors are those of the dense weights, into which the factors are
    folded exactly. The last linear map of an MLP has factors on its inputs, the hidden features.

    Raises:
        ValueError: For a backbone without such layers.
    """

    @override
    def apply(self, backbone: Backbone) -> None:
        offered = select_parameters(backbone.model, backbone.default_trainable)
        backbone.requires_grad_(False)
        add_ia3(backbone.model, among=offered)


def add_ia3(module: nn.Module, *, among: Collection[str] | None = None) -> list[str]:
    """Add trainable factors to keys, values and hidden features, in place; the weights of these layers are frozen.

    Layers are found by the names of open_clip and timm: ``nn.MultiheadAttention`` with packed projections, linear
    layers ``attn.qkv``, ``attn.k_proj``, ``attn.v_proj``, and the last one of an MLP, ``mlp.fc2``, ``mlp.c_proj``,
    ``mlp.w3``.

    Args:
        module: Any module, before it is compiled or wrapped.
        among: Names of the only weights to consider.

    Returns:
        Names of the layers.

    Raises:
        ValueError: If there is no such layer.
    """
    found = []
    for name, layer in list(module.named_modules()):
        weight = f"{name}.{'in_proj_weight' if type(layer) is nn.MultiheadAttention else 'weight'}".lstrip(".")
        if among is not None and weight not in among:
            continue
        if type(layer) is nn.MultiheadAttention and layer.in_proj_weight is not None:
            adapt(layer, IA3MultiheadAttention).add_factors(2 * layer.embed_dim, of_inputs=False)
        elif type(layer) is nn.Linear and _AFTER_HIDDEN.search(name):
            adapt(layer, IA3Linear).add_factors(layer.in_features, of_inputs=True)
        elif type(layer) is nn.Linear and (match := _KEYS_AND_VALUES.search(name)):
            size = layer.out_features * 2 // 3 if match[1] == "qkv" else layer.out_features
            adapt(layer, IA3Linear).add_factors(size, of_inputs=False)
        else:
            continue
        found.append(name)
    if not found:
        raise ValueError(
            f"expected attention or MLP layers in {type(module).__name__} as open_clip and timm name them, got none"
        )
    return found
