"""LoRA adapters on disk in PEFT's format: written from adapted modules, and read into ordinary ones."""

import os
from pathlib import Path

from torch import nn

from clmerge.checkpoints import open_checkpoint
from clmerge.checkpoints.adapter import CONFIG, WEIGHTS, AdapterCheckpoint
from clmerge.checkpoints.adapter_config import lora_config
from clmerge.models.tuning.lora import set_adapter
from clmerge.models.tuning.low_rank import LoRALinear, LowRank
from clmerge.weights import save_tensors, write_json_atomic
from clmerge.weights.parametrization import parametrized
from clmerge.weights.swap import full_copy


def save_adapter(module: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the factors of a module in PEFT's format for LoRA adapters, which PEFT loads without clmerge.

    The factors hold the change since the start of the task (under the start policy ``base``: the whole task vector).
    The files contain neither changes that earlier tasks folded into the weights nor other trained parameters, such as
    a head.

    Args:
        module: A module with LoRA in linear layers; names in the file are relative to it.
        folder: Folder for ``adapter_model.safetensors`` and ``adapter_config.json``.

    Raises:
        ValueError: If there are no factors, or an attention module has factors: PEFT (0.21) adds those of an output
            projection twice. Save the dense weights of such a model.
    """
    found = {path.removesuffix("."): part for path, part in parametrized(module).items() if isinstance(part, LowRank)}
    packed = [path for path, part in found.items() if not isinstance(part, LoRALinear) or path.endswith("out_proj")]
    if packed or not found:
        got = f"{packed[0]!r}, an attention module's" if packed else "none"
        raise ValueError(
            f"expected low-rank factors of linear layers alone in {type(module).__name__}, got {got}; save the dense "
            "weights, which every tool loads"
        )
    tensors, ranks, alphas = {}, {}, {}
    for path, part in found.items():
        a, b = part.factors("weight")
        ranks[path], alphas[path] = len(a), part.lora_scale * len(a)
        tensors[f"base_model.model.{path}.lora_A.weight"] = full_copy(a)
        tensors[f"base_model.model.{path}.lora_B.weight"] = full_copy(b)
    save_tensors(Path(folder) / WEIGHTS[0], tensors, {"format": "pt"})
    write_json_atomic(Path(folder) / CONFIG, lora_config(ranks, alphas))


def load_adapter(module: nn.Module, folder: str | os.PathLike[str]) -> list[str]:
    """Add the factors of an adapter written by PEFT or ``save_adapter`` to a module; they can be trained further.

    Args:
        module: The base model, without factors; the adapter's names are relative to it.
        folder: Folder with ``adapter_config.json`` and the weights.

    Returns:
        Names of the weights with factors.

    Raises:
        ValueError: If the folder holds no plain LoRA adapter, or the adapter has anything but factors of linear layers
            and packed attention projections of this module.
    """
    opened = open_checkpoint(folder)
    if not isinstance(opened, AdapterCheckpoint):
        raise ValueError(f"expected a folder with {CONFIG} and an adapter, got {opened.kind} in {folder}")
    products = opened.products()
    if others := [name for name in opened.entries if name not in products]:
        raise ValueError(
            f"expected an adapter of LoRA factors alone, got also {others[0]!r} in {folder}; merge it into its "
            "base with PEFT (merge_and_unload)"
        )
    return set_adapter(module, products)
