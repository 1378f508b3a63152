"""PEFT's LoRA adapters as task vectors: products of two factors, computed a few rows at a time."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.checkpoints.patterns import BoundedPattern
from clmerge.checkpoints.reader import Checkpoint, Entry
from clmerge.files import parse_json
from clmerge.weights.factored import Product

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?")
# Entries of a product that are computed together; the blocks, and so the bits, do not depend on the requested piece.
_BLOCK = 1 << 16
_ADVICE = "merge it into its base with PEFT (merge_and_unload) and name the merged model"

# Settings with which an adapter is not just a product that is added to a weight.
_REFUSED = (
    "use_dora",
    "lora_bias",
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


@dataclass(frozen=True)
class _Product:
    """``scale * left @ right`` in a weight's shape: names of the factors, and whether PEFT stores the transpose."""

    left: str
    right: str
    turned: bool
    scale: float
    entry: Entry


class AdapterCheckpoint(Checkpoint):
    """A LoRA adapter saved by PEFT, as a task vector: ``scale * B @ A`` for every target module.

    The scale is ``alpha / r`` (``alpha / sqrt(r)`` for rank-stabilised LoRA), with the rank and alpha of the module's
    pattern if there is one. Products have the layout of their weights, also for embeddings, convolutions, transposed
    layers (``fan_in_fan_out``) and attention modules. Other tensors in the file (``modules_to_save``, trained biases)
    are weights.

    Args:
        weights: The open adapter file, by PEFT's names.
        folder: The folder with ``adapter_config.json``.

    Raises:
        ValueError: If the adapter is not plain LoRA, or file and configuration do not match.
    """

    def __init__(self, weights: Checkpoint, folder: Path) -> None:
        config = _read_config(folder / CONFIG)
        self._rank_of = _Setting(config, "rank_pattern", "r", folder / CONFIG)
        self._alpha_of = _Setting(config, "alpha_pattern", "lora_alpha", folder / CONFIG)
        found = {name: match for name in weights.entries if (match := _FACTOR.fullmatch(name))}
        # Only beside factors: a module may be named lora_head and be saved whole.
        around = tuple({f"{match['module']}.lora_" for match in found.values()})
        if others := [name for name in weights.entries if name not in found and name.startswith(around)]:
            raise ValueError(f"expected the factors A and B alone in {weights.source}, got {others[0]!r}; {_ADVICE}")
        self._factors = weights
        self._products: dict[str, _Product] = {}
        self._whole: dict[str, str] = {}
        for name in weights.entries:
            if name not in found:
                self._whole[_plain(name.replace(".base_layer.", "."))] = name
                continue
            start = found[name].start("side")
            a, b = (f"{name[:start]}{side}{name[start + 1 :]}" for side in "AB")
            if other := next((one for one in (a, b) if one not in weights.entries), None):
                raise ValueError(f"expected both factors in {weights.source}, got {name!r} without {other!r}")
            if name == b:
                self._add(found[name], a, b, config)
        if not self._products:
            raise ValueError(
                f"expected LoRA factors in {weights.source}, got {next(iter(weights.entries), 'nothing')!r} and so on"
            )
        entries = {name: product.entry for name, product in self._products.items()}
        entries |= {name: weights.entries[stored] for name, stored in self._whole.items()}
        ranks = sorted({self._rank(product) for product in self._products.values()})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        super().__init__(
            Path(weights.source), f"PEFT adapter of rank {shown}", [*weights.files, folder / CONFIG], entries
        )
        self.is_task_vector = True
        self.rest_is_zero = True

    def _add(self, match: re.Match[str], a: str, b: str, config: Mapping[str, Any]) -> None:
        weights, module = self._factors, match["module"]
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
        turned = bool(match["embedding"]) or (bool(config.get("fan_in_fan_out")) and len(shape) == 2)
        name = _plain(f"{owner}.{inner}" if inner else owner)
        is_attention = f"{module}.base_layer.out_proj.lora_B.weight" in weights.entries
        scale = alpha / (math.sqrt(wanted) if config.get("use_rslora") else wanted)
        if inner == "out_proj":
            # PEFT (0.21) adds this product twice, in MultiheadAttention.merge and in the merge of out_proj that it
            # calls, also in every forward pass: the model was trained and evaluated with it twice.
            scale *= 2
        dtype = torch.float64 if weights.entries[b].dtype == torch.float64 else torch.float32
        self._products[f"{name}.{'in_proj_weight' if is_attention else 'weight'}"] = _Product(
            left=a if turned else b,
            right=b if turned else a,
            turned=turned,
            scale=scale,
            entry=Entry(shape[::-1] if turned else shape, dtype),
        )

    def products(self) -> dict[str, Product]:
        """Return the stored factors of every matrix that the adapter adds a product to."""
        stored = ((name, self._products.get(self.stored(name))) for name in self.entries)
        return {
            name: Product(self._factors.tensor(found.right), self._factors.tensor(found.left), found.scale)
            for name, found in stored
            if found is not None and not found.turned and len(found.entry.shape) == 2
        }

    def _rank(self, product: _Product) -> int:
        return self._factors.entries[product.left].shape[0 if product.turned else 1]

    @override
    def is_difference(self, name: str) -> bool:
        return self.stored(name) not in self._whole

    @override
    def _read(self, name: str) -> Tensor:
        if name in self._whole:
            return self._factors.tensor(self._whole[name])
        return self._rows(name, 0, self._products[name].entry.shape[0]).reshape(self._products[name].entry.shape)

    @override
    def _read_piece(self, name: str, piece: slice) -> Tensor:
        if name in self._whole:
            return super()._read_piece(name, piece)
        width = prod(self._products[name].entry.shape[1:])
        start, stop = int(piece.start), int(piece.stop)
        first = start // width if width else 0
        rows = self._rows(name, first, -(-stop // width) if width else 0)
        return rows.reshape(-1)[start - first * width : stop - first * width]

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        """Compute some rows of a product; blocks begin at the same rows for every request."""
        product = self._products[name]
        left, right = (self._factors.tensor(factor).flatten(1) for factor in (product.left, product.right))
        if product.turned:
            left, right = left.t(), right.t()
        left, right = left.to(product.entry.dtype), right.to(product.entry.dtype)
        height = max(1, _BLOCK // max(right.shape[1], 1))
        begin, end = first // height * height, min(-(-last // height) * height, left.shape[0])
        rows = left.new_empty(end - begin, right.shape[1])
        for row in range(begin, end, height):
            torch.mm(left[row : row + height], right, out=rows[row - begin : row - begin + height])
        return rows.mul_(product.scale)[first - begin : last - begin]


def has_factors(names: Iterable[str]) -> bool:
    """Return whether the names include PEFT's names of factors.

    Example:
        >>> has_factors(["net.lora_head.weight"]), has_factors(["net.0.lora_A.weight"])
        (False, True)
    """
    return any(_FACTOR.fullmatch(name) for name in names)


def _read_config(path: Path) -> dict[str, Any]:
    config = parse_json(path.read_bytes(), str(path))
    if not isinstance(config, dict):
        raise ValueError(f"expected the configuration of a PEFT adapter, got {path} with {type(config).__name__}")
    kind = config.get("peft_type")
    if kind != "LORA" or not {"r", "lora_alpha"} <= config.keys():
        raise ValueError(
            f"expected a LoRA adapter with r and lora_alpha, got {path} of peft_type {str(kind)[:40]!r}; {_ADVICE}"
        )
    for setting in _REFUSED:
        if config.get(setting):
            raise ValueError(
                f"expected plain LoRA, whose product is added to a weight, got {setting}={config[setting]!r} in "
                f"{path}; {_ADVICE}"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVED_BASES):
        raise ValueError(
            f"expected an adapter to the base as it is on disk, got init_lora_weights={start!r} in {path}, which moves "
            "the base too; save it with PEFT's path_initial_model_for_weight_conversion, which converts it"
        )
    for setting in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(setting) or {}, dict):
            raise ValueError(f"expected {setting} of patterns to numbers in {path}, got {str(config[setting])[:80]!r}")
    return config


class _Setting:
    """The rank or alpha of modules: from the first pattern that matches the end of a module's name, as in PEFT."""

    def __init__(self, config: Mapping[str, Any], patterns: str, default: str, path: Path) -> None:
        self._default = _number(config[default], default, path)
        self._patterns: list[tuple[BoundedPattern, float]] = []
        for pattern, value in (config.get(patterns) or {}).items():
            try:
                compiled = BoundedPattern(rf"(.*\.)?({pattern})$")
            except ValueError as error:
                raise ValueError(
                    f"expected patterns of module names in {patterns} of {path}, got {pattern[:80]!r}: {error}"
                ) from error
            self._patterns.append((compiled, _number(value, f"{patterns}[{pattern[:80]!r}]", path)))

    def of(self, module: str) -> float:
        return next((value for pattern, value in self._patterns if pattern.matches(module)), self._default)


def _number(value: Any, key: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a number for {key} in {path}, got {str(value)[:40]!r}")
    return value


def _plain(name: str) -> str:
    return name.removeprefix(_PREFIX)
