"""Read LoRA adapters of PEFT: a file with factors beside a configuration."""

import math
import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from clmerge.checkpoints.adapter import CONFIG, PREFIX, AdapterCheckpoint, Factors, Shift
from clmerge.checkpoints.patterns import BoundedPattern
from clmerge.checkpoints.reader import Checkpoint, Entry
from clmerge.files import parse_json

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?")
_MAGNITUDE, _BIAS = ".lora_magnitude_vector", ".lora_B.bias"
_ADVICE = "merge it into its base with PEFT (merge_and_unload) and name the merged model"

# Settings with which an adapter is not just a product that is added to a weight.
_REFUSED = (
    "use_qalora",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Initialisations that also change the base's weights, so that the factors are not a difference from the base on disk.
_MOVED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


def peft_adapter(
    weights: Checkpoint, config: Mapping[str, Any], where: str, files: Iterable[Path]
) -> AdapterCheckpoint:
    """Read an adapter from its tensors and its configuration.

    The scale is ``alpha / r`` (``alpha / sqrt(r)`` for rank-stabilised LoRA), with the rank and alpha of the module's
    pattern if there is one. Products have the layout of their weights, also for embeddings, convolutions, transposed
    layers (``fan_in_fan_out``) and attention modules. DoRA's magnitudes and the biases of ``lora_bias`` belong to their
    products. Other tensors in the file (``modules_to_save``, trained biases) are weights.

    Args:
        weights: The open adapter file, by PEFT's names.
        config: The configuration.
        where: Where the configuration is, for messages.
        files: All files of the adapter.

    Raises:
        ValueError: If the adapter is not LoRA, or file and configuration do not match.
    """
    return _Parser(weights, config, where).adapter(files)


def read_config(path: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Raises:
        ValueError: If it is not JSON with a dictionary.
    """
    config = parse_json(path.read_bytes(), str(path))
    if not isinstance(config, dict):
        raise ValueError(f"expected the configuration of a PEFT adapter, got {path} with {type(config).__name__}")
    return config


def has_factors(names: Iterable[str]) -> bool:
    """Return whether the names include PEFT's names of factors.

    Example:
        >>> has_factors(["net.lora_head.weight"]), has_factors(["net.0.lora_A.weight"])
        (False, True)
    """
    return any(_FACTOR.fullmatch(name) for name in names)


class _Parser:
    def __init__(self, weights: Checkpoint, config: Mapping[str, Any], where: str) -> None:
        _check_config(config, where)
        self._config = config
        self._rank_of = _Setting(config, "rank_pattern", "r", where)
        self._alpha_of = _Setting(config, "alpha_pattern", "lora_alpha", where)
        self._weights = weights
        self._found = {name: match for name in weights.entries if (match := _FACTOR.fullmatch(name))}
        self._modules = {match["module"] for match in self._found.values()}
        self._products: dict[str, Factors] = {}
        self._shifts: dict[str, Shift] = {}
        self._whole: dict[str, str] = {}

    def adapter(self, files: Iterable[Path]) -> AdapterCheckpoint:
        weights = self._weights
        # Only beside factors: a module may be named lora_head and be saved whole.
        around = tuple({f"{module}.lora_" for module in self._modules})
        for name in weights.entries:
            if name not in self._found:
                if not self._belongs(name) and name.startswith(around):
                    raise ValueError(
                        f"expected factors, magnitudes and their biases in {weights.source}, got {name!r}; {_ADVICE}"
                    )
                if not self._belongs(name):
                    self._whole[_plain(name.replace(".base_layer.", "."))] = name
                continue
            start = self._found[name].start("side")
            a, b = (f"{name[:start]}{side}{name[start + 1 :]}" for side in "AB")
            if other := next((one for one in (a, b) if one not in weights.entries), None):
                raise ValueError(f"expected both factors in {weights.source}, got {name!r} without {other!r}")
            if name == b:
                self._add(self._found[name], a, b)
        if not self._products:
            raise ValueError(
                f"expected LoRA factors in {weights.source}, got {next(iter(weights.entries), 'nothing')!r} and so on"
            )
        ranks = sorted({weights.entries[found.a].shape[0] for found in self._products.values()})
        kind = "DoRA" if any(found.magnitude for found in self._products.values()) else "PEFT"
        return AdapterCheckpoint(
            weights,
            list(files),
            f"{kind} adapter of rank {shown_ranks(ranks)}",
            products=self._products,
            shifts=self._shifts,
            whole=self._whole,
            config=self._config,
        )

    def _belongs(self, name: str) -> bool:
        """Return whether a tensor is a magnitude, or the bias of a factor B."""
        module = name.removesuffix(".weight").removesuffix(_MAGNITUDE)
        if module + _MAGNITUDE in (name, name.removesuffix(".weight")):
            return module in self._modules
        return name.endswith(_BIAS) and name.removesuffix(_BIAS) in self._modules

    def _add(self, match: re.Match[str], a: str, b: str) -> None:
        weights, module = self._weights, match["module"]
        rows, columns = (weights.entries[name].shape for name in (b, a))
        # PEFT keeps a wrapped module under base_layer, which is in a name only if a nested module also has factors.
        owner, _, inner = module.partition(".base_layer.")
        wanted, alpha = self._rank_of.of(_plain(owner)), self._alpha_of.of(_plain(owner))
        is_product = len(rows) > 1 and len(columns) > 1 and rows[1] == columns[0] == wanted and prod(rows[2:]) == 1
        if not is_product or not wanted:
            is_grouped = len(rows) > 1 and wanted in columns[:1] and wanted != rows[1]
            raise ValueError(
                f"expected factors of rank {wanted}, as {CONFIG} says, got shapes {rows} and {columns} of {module!r} "
                f"in {weights.source}; {'grouped convolutions cannot be merged' if is_grouped else _ADVICE}"
            )
        shape = (rows[0], *columns[1:])
        turned = bool(match["embedding"]) or (bool(self._config.get("fan_in_fan_out")) and len(shape) == 2)
        name = _plain(f"{owner}.{inner}" if inner else owner)
        is_attention = f"{module}.base_layer.out_proj.lora_B.weight" in weights.entries
        scale = alpha / (math.sqrt(wanted) if self._config.get("use_rslora") else wanted)
        # PEFT (0.21) adds this product twice, in MultiheadAttention.merge and in the merge of out_proj that it
        # calls, also in every forward pass: the model was trained and evaluated with it twice.
        gain = 2 if inner == "out_proj" else 1
        magnitude = next(
            (m for m in (module + _MAGNITUDE, f"{module}{_MAGNITUDE}.weight") if m in weights.entries), None
        )
        self._check_magnitude(magnitude, module, rows[0], is_attention or gain > 1)
        dtype = torch.float64 if weights.entries[b].dtype == torch.float64 else torch.float32
        self._products[f"{name}.{'in_proj_weight' if is_attention else 'weight'}"] = Factors(
            a=a,
            b=b,
            turned=turned,
            scale=scale * gain,
            entry=Entry(shape[::-1] if turned else shape, dtype),
            gain=gain,
            magnitude=magnitude,
        )
        if (bias := module + _BIAS) in weights.entries:
            if weights.entries[bias].shape != rows[:1] or is_attention or gain > 1:
                raise ValueError(
                    f"expected a bias of {rows[0]} entries for {module!r} in {weights.source}, got shape "
                    f"{weights.entries[bias].shape}; {_ADVICE}"
                )
            self._shifts[f"{name}.bias"] = Shift(bias, scale, Entry(rows[:1], dtype))

    def _check_magnitude(self, magnitude: str | None, module: str, rows: int, is_attention: bool) -> None:
        if (magnitude is None) != (not self._config.get("use_dora")):
            raise ValueError(
                f"expected magnitudes where {CONFIG} says use_dora, got use_dora={self._config.get('use_dora')!r} and "
                f"{'a' if magnitude else 'no'} magnitude of {module!r} in {self._weights.source}; {_ADVICE}"
            )
        if magnitude is not None and (is_attention or prod(self._weights.entries[magnitude].shape) != rows):
            raise ValueError(
                f"expected {rows} magnitudes of {module!r} in {self._weights.source}, got shape "
                f"{self._weights.entries[magnitude].shape}; {_ADVICE}"
            )


def shown_ranks(ranks: list[int]) -> str:
    """Return ranks, in ascending order, as text."""
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _check_config(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA" or not {"r", "lora_alpha"} <= config.keys():
        raise ValueError(
            f"expected a LoRA adapter with r and lora_alpha, got {where} of peft_type {str(kind)[:40]!r}; {_ADVICE}"
        )
    for setting in _REFUSED:
        if config.get(setting):
            raise ValueError(
                f"expected plain LoRA, whose product is added to a weight, got {setting}={config[setting]!r} in "
                f"{where}; {_ADVICE}"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVED_BASES):
        raise ValueError(
            f"expected an adapter to the base as it is on disk, got init_lora_weights={start!r} in {where}, which "
            "moves the base too; save it with PEFT's path_initial_model_for_weight_conversion, which converts it"
        )
    for setting in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(setting) or {}, dict):
            raise ValueError(f"expected {setting} of patterns to numbers in {where}, got {str(config[setting])[:80]!r}")


class _Setting:
    """The rank or alpha of modules: from the first pattern that matches the end of a module's name, as in PEFT."""

    def __init__(self, config: Mapping[str, Any], patterns: str, default: str, where: str) -> None:
        self._default = _number(config[default], default, where)
        self._patterns: list[tuple[BoundedPattern, float]] = []
        for pattern, value in (config.get(patterns) or {}).items():
            try:
                compiled = BoundedPattern(rf"(.*\.)?({pattern})$")
            except ValueError as error:
                raise ValueError(
                    f"expected patterns of module names in {patterns} of {where}, got {pattern[:80]!r}: {error}"
                ) from error
            self._patterns.append((compiled, _number(value, f"{patterns}[{pattern[:80]!r}]", where)))

    def of(self, module: str) -> float:
        return next((value for pattern, value in self._patterns if pattern.matches(module)), self._default)


def _number(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a number for {key} in {where}, got {str(value)[:40]!r}")
    return value


def _plain(name: str) -> str:
    return name.removeprefix(PREFIX)
