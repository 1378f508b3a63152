"""A linear layer whose weights are mixed anew for every image: theta_0 plus low-rank experts under gates."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override


class LayerGate(Protocol):
    """Computes the gates of a layer from what the layer reads."""

    def __call__(self, x: Tensor, read: Tensor) -> Tensor:
        """Return gates ``(B, T)``, or ``(B, ..., T)`` where every token has its own."""


class Gates:
    """The gates of one or several layers during a pass over a batch.

    Args:
        router: Computes them in the first of the layers; none if they are set from outside.
        leader: The layer in which they are computed.

    Attributes:
        value: The gates, ``(B, T)`` or ``(B, ..., T)``; None before the first pass.
    """

    def __init__(self, router: LayerGate | None = None, leader: str = "") -> None:
        self.router = router
        self.leader = leader
        self.value: Tensor | None = None
        self.forced: Tensor | None = None

    def of(self, layer: str, x: Tensor, read: Tensor) -> Tensor:
        """Return the gates for a layer; the leader computes them.

        Args:
            layer: Name of the layer.
            x: Its input, ``(B, ..., in)``.
            read: What every expert reads of it, ``(B, ..., T, r)``.
        """
        if self.forced is not None:
            return self.forced
        if self.router is not None and layer == self.leader:
            self.value = self.router(x, read)
        if self.value is None:
            raise RuntimeError(f"expected gates for {layer}, got none: call the routed model, not a part of it")
        return self.value


class MixtureLinear(nn.Module):
    """``y = W x + b + sum over t of g_t (B_t A_t x + d_t)``, which is the layer with weights mixed for every image.

    For one linear layer, mixing outputs and mixing weights are the same; the gates may differ between the images of a
    batch, and between the tokens of an image. The experts take ``T r (in + out)`` multiply-adds per token.

    Args:
        weight: W, ``(out, in)``, of theta_0.
        bias: b, ``(out,)``; may be None.
        a: A, ``(T, r, in)``.
        b: B transposed, ``(T, r, out)``.
        delta_bias: d, ``(T, out)``; None if no expert changes the bias.
        gates: The gates; layers may share them.
        name: Name of the layer, for ``gates``.

    Example:
        >>> import torch
        >>> gates = Gates()
        >>> a, b = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
        >>> layer = MixtureLinear(torch.eye(2), None, a, b, None, gates)
        >>> gates.value = torch.tensor([[0.0], [0.5]])  # the expert adds twice the first input to the second output
        >>> layer(torch.ones(2, 2))
        tensor([[1., 1.],
                [1., 2.]])
    """

    a: Tensor
    b: Tensor
    delta_bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        delta_bias: Tensor | None,
        gates: Gates,
        name: str = "",
    ) -> None:
        super().__init__()
        if a.ndim != 3 or b.shape[:2] != a.shape[:2] or (b.shape[2], a.shape[2]) != tuple(weight.shape):
            raise ValueError(
                f"expected factors (T, r, in) and (T, r, out) for a weight (out, in), got {tuple(a.shape)} and "
                f"{tuple(b.shape)} for {tuple(weight.shape)}"
            )
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("a", a)
        self.register_buffer("b", b)
        self.register_buffer("delta_bias", delta_bias)
        self.gates = gates
        self.name = name

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, ..., out)`` for ``(B, ..., in)``."""
        read = functional.linear(x, self.a.flatten(0, 1))
        read = read.reshape(*x.shape[:-1], *self.a.shape[:2])
        gate = self.gates.of(self.name, x, read).to(read.dtype)
        gate = gate.reshape(gate.shape[0], *[1] * (x.ndim - gate.ndim), *gate.shape[1:])
        mixed = (read * gate.unsqueeze(-1)).flatten(-2)
        found: Tensor = functional.linear(x, self.weight, self.bias) + mixed @ self.b.flatten(0, 1)
        return found if self.delta_bias is None else found + gate @ self.delta_bias

    def extra_repr(self) -> str:
        """Return the sizes, for ``print``."""
        tasks, rank, width = self.a.shape
        return f"in={width}, out={self.weight.shape[0]}, tasks={tasks}, rank={rank}"
