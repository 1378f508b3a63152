"""Which layers of a model are mixed, and the low-rank expert of a task in each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from clmerge.deploy.routing.mixture import Gates, MixtureLinear
from clmerge.merging.spectral.adapters import adapter_of
from clmerge.weights.task_vector import State

Targets: TypeAlias = Literal["mlp", "linear"]
"""Layers that are mixed: linear layers of MLPs, or all linear layers."""


@dataclass(frozen=True)
class Expert:
    """What a task adds to a linear layer.

    Attributes:
        a: A, ``(r, in)``, with orthogonal rows.
        b: B transposed, ``(r, out)``.
        bias: Change of the bias, ``(out,)``; None if the layer has none that was trained.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {"a": self.a, "b": self.b} | ({} if self.bias is None else {"bias": self.bias})

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Expert:
        """Rebuild an expert from ``state_dict``."""
        return cls(state["a"], state["b"], state.get("bias"))


Experts: TypeAlias = dict[str, Expert]
"""Experts of one task by name of the layer."""


def mixed_layers(model: nn.Module, targets: Targets, names: Iterable[str]) -> list[str]:
    """Return the names of the linear layers that are mixed, in the model's order.

    The projections of ``nn.MultiheadAttention`` are not among them: it computes them without calling a layer, so their
    weights cannot differ between the images of a batch.

    Args:
        model: The dense backbone.
        targets: ``mlp`` for linear layers in a part called ``mlp``, ``linear`` for all.
        names: Names of the merged weights; other layers are the same for all tasks.

    Raises:
        ValueError: If there is no such layer, or images are not the first dimension of what it reads.
    """
    merged = set(names)
    inside = [f"{path}." for path, part in model.named_modules() if isinstance(part, nn.MultiheadAttention)]
    found = [
        path
        for path, part in model.named_modules()
        if isinstance(part, nn.Linear)
        and f"{path}.weight" in merged
        and not path.startswith(tuple(inside))
        and (targets == "linear" or "mlp" in path.split("."))
    ]
    if not found:
        kind = "of an MLP" if targets == "mlp" else "that is called as a layer"
        raise ValueError(
            f"expected a trained linear layer {kind} to mix, got none in {type(model).__name__}"
            f"{'; try targets=linear' if targets == 'mlp' else ''}"
        )
    for path in found:
        parts = path.split(".")
        for length in range(len(parts)):
            if getattr(model.get_submodule(".".join(parts[:length])), "batch_first", True) is False:
                raise ValueError(
                    f"expected layers that read images as their first dimension, got {path} inside of "
                    f"{'.'.join(parts[:length])}, which has tokens there (batch_first=False)"
                )
    return found


def experts_of(tau: State, layers: Sequence[str], rank: int | None, *, density: float = 1.0) -> Experts:
    """Return the experts of a task: the leading singular triplets of what its vector adds to each layer.

    Args:
        tau: The task vector by name.
        layers: Names of the layers.
        rank: Triplets of each layer; default all.
        density: Share of the entries of each matrix that are kept before, by magnitude.
    """
    found: Experts = {}
    for layer in layers:
        matrix = tau[f"{layer}.weight"]
        if density < 1.0:
            matrix = _largest(matrix, density)
        product = adapter_of({layer: matrix}, min(rank or min(matrix.shape), *matrix.shape))[layer]
        bias = tau.get(f"{layer}.bias")
        found[layer] = Expert(product.a.cpu(), product.b.mT.contiguous().cpu(), None if bias is None else bias.cpu())
    return found


def _largest(matrix: Tensor, density: float) -> Tensor:
    count = max(1, round(density * matrix.numel()))
    threshold = matrix.abs().flatten().kthvalue(matrix.numel() - count + 1).values
    return torch.where(matrix.abs() >= threshold, matrix, 0.0)


def stacked(experts: Sequence[Experts], layer: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the factors of a layer for all tasks: ``(T, r, in)``, ``(T, r, out)`` and ``(T, out)``.

    Args:
        experts: Experts of every task.
        layer: Name of the layer.
    """
    own = [one[layer] for one in experts]
    biases = [one.bias for one in own if one.bias is not None]
    bias = torch.stack(biases) if len(biases) == len(own) else None
    return torch.stack([one.a for one in own]), torch.stack([one.b for one in own]), bias


def put_mixtures(
    model: nn.Module, base: State, experts: Sequence[Experts], gates: Mapping[str, Gates]
) -> dict[str, MixtureLinear]:
    """Replace linear layers by mixtures of theta_0 and experts, in place; return them by name.

    Args:
        model: The backbone.
        base: theta_0 by name.
        experts: Experts of every task.
        gates: Gates by name of the layer.
    """
    found = {}
    for layer, its in gates.items():
        own: Any = model.get_submodule(layer)
        bias = None if own.bias is None else base.get(f"{layer}.bias", own.bias.detach())
        weight = base[f"{layer}.weight"]
        a, b, delta = stacked(experts, layer)
        delta = None if delta is None else delta.to(weight)
        found[layer] = MixtureLinear(weight, bias, a.to(weight), b.to(weight), delta, its, layer)
        model.set_submodule(layer, found[layer])
    return found
