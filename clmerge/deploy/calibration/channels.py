"""Means and standard deviations of the channels of layers, measured and set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

EPS = 1e-5  # added to variances, as batch normalisation does

_Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Spread(NamedTuple):
    """Mean and standard deviation of every channel, ``(channels,)``, float64 on the CPU."""

    mean: Tensor
    std: Tensor

    @classmethod
    def average(cls, several: Sequence[Spread]) -> Spread:
        """Return the mean of means and the mean of standard deviations."""
        return cls(*(torch.stack(parts).mean(dim=0) for parts in zip(*several, strict=True)))


class Channels:
    """A layer and its outputs before the non-linearity, channel by channel.

    Args:
        name: Dense name of the layer.
        layer: ``nn.Linear``, a convolution, or an ``nn.MultiheadAttention`` for its packed input projection.

    Attributes:
        weight: Name of the weight whose rows give the channels, in the layer.
        bias: Name of the bias.
    """

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name, self.layer = name, layer
        packed = isinstance(layer, nn.MultiheadAttention)
        self.weight, self.bias = ("in_proj_weight", "in_proj_bias") if packed else ("weight", "bias")

    def watch(self, act: Any) -> Any:
        """Call ``act`` with the outputs of every call, ``(rows, channels)``; return the hook's handle."""
        layer: Any = self.layer
        if isinstance(layer, nn.MultiheadAttention):

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                query = args[0] if args else kwargs["query"]
                act(functional.linear(query, layer.in_proj_weight, layer.in_proj_bias).flatten(0, -2))

            return layer.register_forward_pre_hook(before, with_kwargs=True)
        convolves = isinstance(layer, _Conv)

        def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            act((output.movedim(1, -1) if convolves else output).flatten(0, -2))

        return layer.register_forward_hook(after)

    @torch.no_grad()
    def match(self, found: Spread, goal: Spread) -> dict[str, Tensor]:
        """Change weight and bias so that channels with one spread have another; return both by dense name."""
        weight, bias = (getattr(self.layer, name) for name in (self.weight, self.bias))
        rescaled = matched(weight, bias, found, goal)
        for name, tensor in zip((self.weight, self.bias), rescaled, strict=True):
            setattr(self.layer, name, nn.Parameter(tensor, requires_grad=False))
        return {f"{self.name}.{name}": t for name, t in zip((self.weight, self.bias), rescaled, strict=True)}


def matched(weight: Tensor, bias: Tensor, found: Spread, goal: Spread) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a layer whose outputs with one mean and standard deviation get others.

    ``gamma = goal std / found std``, ``w' = gamma w``, ``b' = goal mean + gamma (b - found mean)``.

    Args:
        weight: ``(channels, ...)``.
        bias: ``(channels,)``.
        found: What the outputs have.
        goal: What they get.

    Example:
        >>> found = Spread(torch.tensor([0.5]), torch.tensor([2.0]))
        >>> goal = Spread(torch.tensor([1.0]), torch.tensor([2.0]))
        >>> matched(torch.tensor([[3.0]]), torch.tensor([0.0]), found, goal)
        (tensor([[3.]]), tensor([0.5000]))
    """
    gamma = goal.std / found.std
    shift = goal.mean + gamma * (bias.double().cpu() - found.mean)
    rows = gamma.to(weight.device).view(-1, *[1] * (weight.ndim - 1))
    return (weight.double() * rows).to(weight.dtype), shift.to(bias)


def matched_layers(network: nn.Module, targets: Sequence[str], trained: Iterable[str]) -> list[Channels]:
    """Return the layers that match, of those with trained weights.

    Args:
        network: A module without parametrized parts.
        targets: Glob patterns of names of layers.
        trained: Dense names of the trained weights.

    Raises:
        ValueError: If a layer that matches has no bias.
    """
    names = {*trained}
    found = []
    for name, layer in network.named_modules():
        if not any(fnmatchcase(name, pattern) for pattern in targets):
            continue
        packed = isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None
        if not (packed or isinstance(layer, (nn.Linear, *_Conv))):
            continue
        one = Channels(name, layer)
        if f"{name}.{one.weight}" in names:
            if getattr(layer, one.bias) is None:
                raise ValueError(
                    f"expected layers with a bias, which shifts the means of channels, got {name!r} without one; "
                    "leave it out of targets"
                )
            found.append(one)
    return found


@torch.no_grad()
def spreads(layers: Sequence[Channels], network: nn.Module, batches: Iterable[Tensor]) -> dict[str, Spread]:
    """Return mean and standard deviation of the channels of layers, over all images and positions.

    The standard deviation is the root of the variance (of the population) plus ``EPS``.

    Args:
        layers: Layers of the network.
        network: Called with the images, in evaluation mode.
        batches: The images.

    Returns:
        Spreads by name of the layer, in the order in which the network calls them; without those that it never calls.
    """
    sums: dict[str, _Sums] = {}
    with ExitStack() as hooks:
        for one in layers:
            handle = one.watch(lambda rows, name=one.name: sums.setdefault(name, _Sums()).add(rows))
            hooks.callback(handle.remove)
        for images in batches:
            network(images)
    return {name: found.spread() for name, found in sums.items()}


class _Sums:
    """Count, mean and sum of squares around the mean, joined batch by batch in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0

    def add(self, rows: Tensor) -> None:
        mean = rows.sum(dim=0, dtype=torch.float64) / len(rows)
        squares = (rows - mean.to(rows.dtype)).square().sum(dim=0, dtype=torch.float64)
        error = mean - mean.to(rows.dtype)  # of the centre in the precision of the rows
        squares = squares - len(rows) * error.square()
        total = self.count + len(rows)
        step = mean - self.mean
        self.mean = self.mean + step * (len(rows) / total)
        self.squares = self.squares + squares + step.square() * (self.count * len(rows) / total)
        self.count = total

    def spread(self) -> Spread:
        variance = (self.squares / self.count).clamp(min=0)
        return Spread(self.mean.cpu(), (variance + EPS).sqrt().cpu())


def to_state(goals: Mapping[str, Spread]) -> dict[str, dict[str, Tensor]]:
    """Return spreads as float32 tensors by name."""
    return {name: {"mean": one.mean.float(), "std": one.std.float()} for name, one in goals.items()}


def from_state(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Spread]:
    """Return spreads from ``to_state``."""
    return {name: Spread(one["mean"].double(), one["std"].double()) for name, one in state.items()}
