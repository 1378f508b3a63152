"""Read LoRA adapters in the layouts of kohya's scripts and of diffusers, where they hold a vision or text tower."""

import math
import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

import torch

from clmerge.checkpoints.adapter import PREFIX, AdapterCheckpoint, Factors
from clmerge.checkpoints.peft_adapter import has_factors, peft_adapter, shown_ranks
from clmerge.checkpoints.reader import Checkpoint, Entry
from clmerge.checkpoints.safetensors_file import SafetensorsCheckpoint
from clmerge.files import parse_json

HEADER = "lora_adapter_metadata"
"""Header entry in which diffusers keeps the configurations of PEFT, one for each part of a pipeline."""

# lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight: the module's dots are underscores.
_KOHYA = re.compile(r"(?P<part>lora_[a-z]+\d*)_(?P<module>[^.]+)\.lora_(?P<side>down|up)\.weight")
# text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight
_LAYER = re.compile(r"(?P<module>.+?)\.lora(?:_linear_layer)?\.(?P<side>down|up)\.weight")
# ...attn1.processor.to_q_lora.down.weight, and ...self_attn.to_q_lora.down.weight for a text tower of transformers
_ATTENTION = re.compile(
    r"(?P<owner>.+?)(?P<processor>\.processor)?\.to_(?P<which>q|k|v|out)_lora\.(?P<side>down|up)\.weight"
)
_DENOISERS = ("unet", "lora_unet", "transformer", "lora_transformer")
_ADVICE = "merge it into its base with the program that trained it, and name the merged model"


class _Layer(NamedTuple):
    """A module of the network: the part of the pipeline that it belongs to, and its name there."""

    part: str
    module: str
    is_flat: bool

    @property
    def alpha(self) -> str:
        """Name of the tensor with its alpha."""
        return f"{self.part}{'_' if self.is_flat else '.'}{self.module}.alpha".lstrip(".")


def is_diffusion_adapter(checkpoint: Checkpoint) -> bool:
    """Return whether a file holds factors by the names of kohya's scripts or diffusers."""
    if any(map(_parsed, checkpoint.entries)):
        return True
    return has_factors(checkpoint.entries) and bool(_configuration(checkpoint))


def diffusion_adapter(checkpoint: Checkpoint, weights: str | None) -> AdapterCheckpoint:
    """Read one part of an adapter to an image generator: of its towers, not of what generates.

    The scale is ``alpha / rank``, or 1 where the file has no alpha.

    Args:
        checkpoint: The open file.
        weights: The part, as its names begin (``text_encoder``, ``lora_te1``). Default: the only one that is no
            denoiser.

    Returns:
        The adapter. Where the file has underscores in place of dots, ``is_flat`` is set, and ``align_names`` finds the
        base's names.

    Raises:
        ValueError: If there is no tower, several without a choice, or anything but factors and their scales.
    """
    if not any(map(_parsed, checkpoint.entries)):
        return _with_configuration(checkpoint, weights)
    layers: dict[_Layer, dict[str, str]] = {}
    for name in checkpoint.entries:
        if parsed := _parsed(name):
            layers.setdefault(parsed[0], {})[parsed[1]] = name
    alphas = {layer.alpha: layer for layer in layers}
    for name in checkpoint.entries:
        if _parsed(name) is None and name not in alphas:
            raise ValueError(
                f"expected factors and their alphas in {checkpoint.source}, got {name!r} among them, which is no plain "
                f"LoRA; {_ADVICE}"
            )
    part, others = _chosen(list(dict.fromkeys(layer.part for layer in layers)), weights, checkpoint.source)
    scales = {layer: name for name, layer in alphas.items() if name in checkpoint.entries}
    products = {}
    for layer, sides in layers.items():
        if layer.part == part:
            name = f"{part}.{layer.module}.weight" if layer.is_flat else f"{layer.module}.weight"
            products[name] = _factors(checkpoint, layer, sides, scales.get(layer))
    ranks = sorted({checkpoint.entries[found.a].shape[0] for found in products.values()})
    layout = "kohya" if any(layer.is_flat for layer in layers) else "diffusers"
    kind = f"LoRA of {layout} of rank {shown_ranks(ranks)}{_beside(part, others)}"
    found = AdapterCheckpoint(checkpoint, checkpoint.files, kind, products=products)
    found.is_flat = any(layer.is_flat for layer in layers)
    found.sets, found.weights = [one for one in (part, *others) if one], part
    return found


def _factors(checkpoint: Checkpoint, layer: _Layer, sides: Mapping[str, str], alpha: str | None) -> Factors:
    if other := next((side for side in ("down", "up") if side not in sides), None):
        raise ValueError(
            f"expected both factors in {checkpoint.source}, got {next(iter(sides.values()))!r} without lora_{other}"
        )
    rows, columns = (checkpoint.entries[sides[side]].shape for side in ("up", "down"))
    if len(rows) < 2 or len(columns) < 2 or rows[1] != columns[0] or not rows[1] or prod(rows[2:]) != 1:
        raise ValueError(
            f"expected factors that can be multiplied in {checkpoint.source}, got shapes {rows} and {columns} of "
            f"{layer.module!r}; {_ADVICE}"
        )
    scale = 1.0
    if alpha is not None:
        stored = checkpoint.tensor(alpha)
        if stored.numel() != 1 or not math.isfinite(value := float(stored.reshape(()))):
            raise ValueError(f"expected a number for {alpha!r} in {checkpoint.source}, got shape {tuple(stored.shape)}")
        scale = value / rows[1]
    dtype = torch.float64 if checkpoint.entries[sides["up"]].dtype == torch.float64 else torch.float32
    entry = Entry((rows[0], *columns[1:]), dtype)
    return Factors(a=sides["down"], b=sides["up"], turned=False, scale=scale, entry=entry)


def _parsed(name: str) -> tuple[_Layer, str] | None:
    """Return the layer and the side (down or up) of a factor; None for another tensor."""
    if "lora" not in name:
        return None
    if match := _KOHYA.fullmatch(name):
        return _Layer(match["part"], match["module"], True), match["side"]
    if match := _ATTENTION.fullmatch(name):
        which = match["which"]
        if match["processor"]:
            inner = "to_out.0" if which == "out" else f"to_{which}"
        else:
            inner = "out_proj" if which == "out" else f"{which}_proj"
        module = f"{match['owner']}.{inner}"
    elif match := _LAYER.fullmatch(name):
        module = match["module"]
    else:
        return None
    part, _, rest = module.partition(".")
    is_part = part in _DENOISERS or part.startswith(("text_encoder", "image_encoder"))
    return _Layer(part if is_part else "", rest if is_part else module, False), match["side"]


def _chosen(parts: list[str], weights: str | None, source: str) -> tuple[str, list[str]]:
    """Return the part to read, and the others."""
    towers = [part for part in parts if part not in _DENOISERS]
    if weights in parts:
        part = weights
    elif len(parts) == 1:
        part = parts[0]
    elif len(towers) == 1 and weights is None:
        part = towers[0]
    else:
        got = f"{weights!r}, and there are " if weights is not None else ""
        got += ", ".join(part or "one without a name" for part in parts)
        first = next(filter(None, towers or parts))
        raise ValueError(f"expected one part of the adapter {source}, got {got}; choose one with --weights {first}")
    return part, [other for other in parts if other != part]


def _beside(part: str, others: Iterable[str]) -> str:
    others = ", ".join(map(repr, others))
    return (f", under {part!r}" if part else "") + (f" (there are also {others})" if others else "")


def _configuration(checkpoint: Checkpoint) -> dict[str, Any]:
    if not isinstance(checkpoint, SafetensorsCheckpoint) or HEADER not in checkpoint.metadata:
        return {}
    where = f"{HEADER!r} in the header of {checkpoint.source}"
    found = parse_json(checkpoint.metadata[HEADER], where)
    if not isinstance(found, dict):
        raise ValueError(f"expected configurations of PEFT under {where}, got {type(found).__name__}")
    return found


def _with_configuration(checkpoint: Checkpoint, weights: str | None) -> AdapterCheckpoint:
    """Read a file by PEFT's names whose configurations are in the header, by the parts of the pipeline."""
    settings = _configuration(checkpoint)
    where = f"{HEADER!r} in the header of {checkpoint.source}"
    parts = list(dict.fromkeys(name.partition(".")[0] for name in checkpoint.entries))
    part, others = _chosen(parts, weights, checkpoint.source)
    prefix = f"{part}."
    config = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    checkpoint.rename(lambda name: PREFIX + name.removeprefix(prefix) if name.startswith(prefix) else None)
    found = peft_adapter(checkpoint, {"peft_type": "LORA"} | config, where, checkpoint.files)
    found.kind += _beside(part, others)
    found.sets, found.weights = parts, part
    return found
