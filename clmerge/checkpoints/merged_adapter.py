"""A merge of LoRA adapters as one adapter of a chosen rank, computed matrix by matrix."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from clmerge.checkpoints.adapter import PREFIX, AdapterCheckpoint, Factors
from clmerge.checkpoints.adapter_config import lora_config
from clmerge.checkpoints.reader import Checkpoint, Entry
from clmerge.merging.vectors import Pack

# Share of the squared norm that may lie outside of what the factors span: rounding of float32 sums is far below.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class Kept:
    """The squared norm of a merged matrix, and how much of it the written factors have."""

    energy: float
    kept: float

    @property
    def share(self) -> float:
        """The share that is kept; 1 for a matrix of zeros."""
        return self.kept / self.energy if self.energy else 1.0


@dataclass(frozen=True)
class _Target:
    """How one merged weight is written: names and shapes of its factors, or its name where it is written whole."""

    module: str
    a: str
    b: str
    rank: int
    turned: bool
    gain: int


class MergedAdapter:
    """The tensors and the configuration of the adapter that a merge of adapters is written as.

    A merged matrix is replaced by its nearest matrix of the rank (Eckart-Young, in float64). Where it lies in what the
    adapters' factors span, as for every linear rule, the decomposed matrix is as small as the sum of their ranks; else,
    as after a trim, it is the merged matrix itself. The scale of every product is 1: alpha is the rank.

    Args:
        base: The base model.
        models: The adapters.
        names: The merged weights.
        rank: The largest rank of a product.
        dtype: Dtype of the factors. Default: the widest of the adapters'.

    Attributes:
        entries: Shape and dtype of every tensor to write.
        kept: What was kept of every matrix, once ``tensors`` has computed it.

    Raises:
        ValueError: If the rank is below 1, a model is no adapter, or the adapters cannot be written as one.
    """

    def __init__(
        self, base: Checkpoint, models: Sequence[Checkpoint], names: Sequence[str], rank: int, dtype: torch.dtype | None
    ) -> None:
        if isinstance(rank, bool) or rank < 1:
            raise ValueError(f"expected --lora-rank of at least 1, got {rank}")
        self._adapters: list[AdapterCheckpoint] = []
        for model in models:
            if not isinstance(model, AdapterCheckpoint):
                raise ValueError(
                    f"expected LoRA adapters for --lora-rank, got {model.source} ({model.kind}); leave --lora-rank out "
                    "to write dense weights"
                )
            self._adapters.append(model)
        self._base = base
        self.entries: dict[str, Entry] = {}
        self.kept: dict[str, Kept] = {}
        self._targets: dict[str, _Target] = {}
        self._whole: dict[str, str] = {}
        turned: dict[bool, str] = {}
        for name in names:
            owner = next(one for one in self._adapters if name in one.entries)
            found = owner.factors(name)
            kind = dtype or _widest([one.dtype(name) for one in self._adapters if name in one.entries])
            if found is None:
                self._whole[name] = _whole_name(owner, name)
                self.entries[self._whole[name]] = Entry(base.entries[name].shape, kind)
                continue
            if ".lora_embedding_" not in found.a and len(found.entry.shape) == 2:
                turned.setdefault(found.turned, name)
            self._add(name, owner, found, rank, kind)
        if len(turned) > 1:
            raise ValueError(
                f"expected linear layers of one layout, got {turned[True]!r}, which is stored transposed, and "
                f"{turned[False]!r}; a PEFT adapter has one fan_in_fan_out for both: leave --lora-rank out"
            )
        if not self._targets:
            raise ValueError("expected a merged matrix with factors for --lora-rank, got none; leave it out")
        self._is_turned = True in turned

    def _add(self, name: str, owner: AdapterCheckpoint, found: Factors, rank: int, dtype: torch.dtype) -> None:
        shape = self._base.entries[name].shape
        rows, columns = (shape[::-1] if found.turned else (shape[0], prod(shape[1:])))[:2]
        least = min(rank, rows, columns)
        a, b, module = _names(owner, name, found)
        self._targets[name] = _Target(module, a, b, least, found.turned, found.gain)
        inside = shape[1:] if len(shape) > 2 else (columns,)
        self.entries[a] = Entry((least, *inside), dtype)
        self.entries[b] = Entry((rows, least, *(1 for _ in shape[2:])), dtype)

    @property
    def largest(self) -> int:
        """Entries of the largest merged matrix."""
        return max(self._base.entries[name].numel for name in self._targets)

    def tensors(self, pack: Pack, tau: Tensor) -> Iterator[tuple[Pack, Tensor]]:
        """Yield what is written for some merged parameters: factors, or whole weights.

        Args:
            pack: The parameters.
            tau: Their merged vectors, flat and concatenated.
        """
        for name, merged in pack.parts(tau).items():
            if name in self._whole:
                stored = self._whole[name]
                theta = self._base.tensor(name).to(merged.dtype) + merged
                yield Pack({stored: tuple(merged.shape)}), theta.reshape(-1).to(self.entries[stored].dtype)
                continue
            target = self._targets[name]
            matrix = merged.reshape(len(merged), -1).double() / target.gain
            a, b, self.kept[name] = _factored(matrix.t() if target.turned else matrix, target.rank, self._spans(name))
            for stored, factor in ((target.a, a), (target.b, b)):
                entry = self.entries[stored]
                yield Pack({stored: entry.shape}), factor.contiguous().reshape(-1).to(entry.dtype)

    def config(self) -> dict[str, Any]:
        """Return the content of ``adapter_config.json``."""
        ranks = {target.module: target.rank for target in self._targets.values()}
        configs = [adapter.config for adapter in self._adapters]
        saved = {
            module for config in configs for module in config.get("modules_to_save") or () if isinstance(module, str)
        }
        whole = [name for stored, name in self._whole.items() if stored.endswith(".bias")]
        in_saved = {name for name in whole if any(f".{module}." in f".{name}" for module in saved)}
        return lora_config(
            ranks,
            dict(ranks),
            task_type=_common(config.get("task_type") for config in configs),
            base_model_name_or_path=_common(config.get("base_model_name_or_path") for config in configs),
            fan_in_fan_out=self._is_turned,
            bias=next((config["bias"] for config in configs if config.get("bias", "none") != "none"), "lora_only")
            if set(whole) - in_saved
            else "none",
            modules_to_save=sorted(saved) or None,
        )

    def report(self) -> str:
        """Return the share of the squared norm that was kept, of all matrices and of the one that lost most."""
        energy = sum(one.energy for one in self.kept.values())
        kept = Kept(energy, sum(one.kept for one in self.kept.values()))
        name, least = min(self.kept.items(), key=lambda item: item[1].share)
        text = f"kept    {100 * kept.share:.2f} % of the energy of {len(self.kept)} matrices"
        return f"{text}, least {100 * least.share:.2f} % of {name}"

    def _spans(self, name: str) -> list[tuple[Tensor, Tensor]] | None:
        spans = [adapter.span(name) for adapter in self._adapters if name in adapter.entries]
        found = [span for span in spans if span is not None]
        return found if len(found) == len(spans) else None


def _factored(matrix: Tensor, rank: int, spans: Sequence[tuple[Tensor, Tensor]] | None) -> tuple[Tensor, Tensor, Kept]:
    """Return A and B of the nearest matrix of a rank, and the share that it keeps.

    Args:
        matrix: The matrix, of shape (out, in), float64.
        rank: The rank, at most the smaller side.
        spans: Factors B and A whose columns and rows may span the matrix.
    """
    energy = float(matrix.square().sum())
    left = right = None
    core = matrix
    if spans and sum(b.shape[1] for b, _ in spans) < min(matrix.shape):
        left = torch.linalg.qr(torch.cat([b.double() for b, _ in spans], dim=1)).Q
        right = torch.linalg.qr(torch.cat([a.double() for _, a in spans]).t()).Q
        inner = left.t() @ matrix @ right
        if energy - float(inner.square().sum()) <= _ROUNDING * energy:
            core = inner
        else:
            left = right = None
    u, values, vh = torch.linalg.svd(core, full_matrices=False)
    least = min(rank, len(values))
    roots = values[:least].sqrt()
    b, a = u[:, :least] * roots, roots[:, None] * vh[:least]
    if left is not None and right is not None:
        b, a = left @ b, a @ right.t()
    if least < rank:  # the factors of the adapters have less than the rank together
        b = torch.nn.functional.pad(b, (0, rank - least))
        a = torch.nn.functional.pad(a, (0, 0, 0, rank - least))
    kept = energy if least == len(values) else min(energy, float(values[:least].square().sum()))
    return a, b, Kept(energy, kept)


def _names(owner: AdapterCheckpoint, name: str, found: Factors) -> tuple[str, str, str]:
    """Return the names of A and B in a file of PEFT, and the module's name."""
    if owner.config:
        module = re.split(r"\.lora_(?:embedding_)?[AB](?:\.weight)?$", found.a.removeprefix(PREFIX))[0]
        return (
            PREFIX + found.a.removeprefix(PREFIX),
            PREFIX + found.b.removeprefix(PREFIX),
            module.partition(".base_layer.")[0],
        )
    module = name.removesuffix(".weight")
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight", module


def _whole_name(owner: AdapterCheckpoint, name: str) -> str:
    """Return the name of a weight that is stored whole in a file of PEFT; biases stay in the wrapped module."""
    stored = owner.whole_name(name)
    if stored is not None:
        return PREFIX + stored.removeprefix(PREFIX)
    module = owner.stored(name).removesuffix(".bias")
    return f"{PREFIX}{module}.base_layer.bias"


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    found = dtypes[0]
    for dtype in dtypes[1:]:
        found = torch.promote_types(found, dtype)
    return found


def _common(values: Iterable[Any]) -> Any:
    found = [*values]
    return found[0] if found and all(value == found[0] for value in found) else None
