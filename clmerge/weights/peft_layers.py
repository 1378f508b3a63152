"""Access to LoRA layers of Hugging Face's PEFT through their dense weights; PEFT is not imported."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from clmerge.weights.parametrized import Parametrized
from clmerge.weights.task_vector import State, apply_task_vector

_WEIGHT = "weight"
_BASE = "base_layer."


def seen_as_dense(module: nn.Module, path: str) -> Parametrized | None:
    """Return a ``Parametrized`` view of a module if it is a PEFT layer, else None.

    Args:
        module: Any module.
        path: Its name, for the error message.

    Raises:
        RuntimeError: If it is a PEFT layer that does not just add a product to a weight.
    """
    if "base_layer" not in module._modules or not hasattr(module, "adapter_layer_names"):
        return None
    if reason := _unlike_lora(module):
        raise RuntimeError(
            f"expected LoRA layers of PEFT that add a product to a weight, got {type(module).__name__} at {path!r}, "
            f"{reason}: merging what it trains entry by entry is not merging what it computes; tune with "
            "clmerge.models.add_lora instead, or merge each task's adapter into a model of its own (merge_and_unload) "
            "and these with `clmerge merge`"
        )
    return LoRALayerOfPEFT(module)


class LoRALayerOfPEFT(Parametrized):
    """A PEFT LoRA layer around a linear layer, a convolution or an embedding.

    A merged model has its dense weight in the base layer and B = 0. Otherwise the trained change stays in the factors:
    ``renew`` does not change them, so that PEFT's own files still match the base they were trained on.

    Args:
        layer: The layer; it stays in its model.
    """

    shardable: ClassVar[bool] = False

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not as a submodule: it belongs to another model

    @property
    def _base(self) -> nn.Module:
        base: nn.Module = self.__dict__["layer"].base_layer
        return base

    @override
    def names(self) -> Sequence[str]:
        return [_WEIGHT]

    @override
    def inner(self) -> Sequence[str]:
        layer: nn.Module = self.__dict__["layer"]
        return [name for name, _ in layer.named_parameters() if not name.startswith(_BASE)]

    @override
    def dense(self) -> dict[str, Tensor]:
        layer: Any = self.__dict__["layer"]
        weight: Tensor = layer.base_layer.weight
        for adapter in _active(layer):
            weight = weight + layer.get_delta_weight(adapter)
        return {_WEIGHT: weight}

    @override
    def state(self, base: State, tau: State) -> dict[str, Tensor]:
        layer: Any = self.__dict__["layer"]
        values = {_BASE + name: tensor for name, tensor in apply_task_vector(base, tau).items()}
        for adapter in _active(layer) if values else ():
            if adapter in layer.lora_B:
                values[f"lora_B.{adapter}.weight"] = torch.zeros_like(layer.lora_B[adapter].weight)
            else:
                values[f"lora_embedding_B.{adapter}"] = torch.zeros_like(layer.lora_embedding_B[adapter])
        return values

    @override
    def renew(self, generator: torch.Generator) -> None:
        pass

    @override
    def folded(self) -> nn.Module:
        plain = copy.deepcopy(self._base)
        plain.weight = nn.Parameter(self.dense()[_WEIGHT].detach().clone())
        return plain

    @override
    def dense_name(self, own: str) -> str:
        return own.removeprefix(_BASE)


def _active(layer: Any) -> list[str]:
    """Return the names of the active adapters of a layer."""
    if layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A or name in layer.lora_embedding_A]


def _unlike_lora(layer: Any) -> str | None:
    """Return why a PEFT layer is not a weight plus a product; None if it is one."""
    if not hasattr(layer, "lora_A"):
        return "which is not LoRA"
    weight = getattr(layer.base_layer, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return f"which wraps {type(layer.base_layer).__name__}"
    if not weight.is_floating_point():
        return "whose weight is quantized"
    if getattr(layer.base_layer, "groups", 1) > 1:
        return "whose convolution has groups, for which PEFT has no product either"
    if layer.merged:
        return "whose adapter is merged into its weight now (unmerge_adapter() takes it out)"
    for adapter in _active(layer):
        if getattr(layer, "lora_variant", {}).get(adapter) or layer.use_dora.get(adapter):
            return "which is a variant of LoRA, such as DoRA"
        if adapter in layer.lora_B and layer.lora_B[adapter].bias is not None:
            return "which trains a bias of its factors (lora_bias)"
    return None
