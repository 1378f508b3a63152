"""What units do on images: inputs and outputs of linear layers of two networks, summed up in one pass."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clmerge.alignment.spec import PermutationSpec
from clmerge.weights.modes import eval_mode

Rows = dict[str, Tensor]
FEATURES = ""
"""Name of the network's own outputs among the rows."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def recorded(model: nn.Module) -> Iterator[tuple[Rows, Rows]]:
    """Run a block in which every forward pass leaves inputs and outputs of the linear layers, one row per position.

    Of ``nn.MultiheadAttention``, whose projections are functions, they are computed from its query.

    Args:
        model: The network.

    Yields:
        Inputs ``(N, in)`` and outputs ``(N, out)`` by the name of the layer's weight; of convolutions outputs alone.
    """
    inputs: Rows = {}
    outputs: Rows = {}
    handles = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.MultiheadAttention):
            hook: Callable[..., Any] = partial(_attention, prefix, inputs, outputs)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        elif isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
            handles.append(module.register_forward_hook(partial(_layer, f"{prefix}weight", inputs, outputs)))
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def _layer(name: str, inputs: Rows, outputs: Rows, module: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> None:
    if isinstance(module, nn.Linear):
        inputs[name], outputs[name] = given[0].reshape(-1, given[0].shape[-1]), found.reshape(-1, found.shape[-1])
    else:
        outputs[name] = found.movedim(1, -1).reshape(-1, found.shape[1])


def _attention(
    prefix: str,
    inputs: Rows,
    outputs: Rows,
    module: nn.MultiheadAttention,
    given: tuple[Tensor, ...],
    kwargs: Mapping[str, Any],
    found: tuple[Tensor, ...],
) -> None:
    asking: Tensor = given[0] if given else kwargs["query"]
    batch = asking if module.batch_first else asking.transpose(0, 1)
    projected = functional.linear(batch, module.in_proj_weight, module.in_proj_bias)
    batch_size, positions, _ = batch.shape
    query, key, value = (
        part.reshape(batch_size, positions, module.num_heads, -1).transpose(1, 2) for part in projected.chunk(3, dim=-1)
    )
    mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
    result = found[0] if module.batch_first else found[0].transpose(0, 1)
    for name, ins, outs in (("in_proj_weight", batch, projected), ("out_proj.weight", mixed, result)):
        inputs[prefix + name] = ins.reshape(-1, ins.shape[-1])
        outputs[prefix + name] = outs.reshape(-1, outs.shape[-1])


@dataclass
class _Sums:
    """Sums over rows of two sets of columns, in float64."""

    count: int = 0
    left: Tensor = field(default_factory=lambda: torch.zeros(()))
    right: Tensor = field(default_factory=lambda: torch.zeros(()))
    left_squares: Tensor = field(default_factory=lambda: torch.zeros(()))
    right_squares: Tensor = field(default_factory=lambda: torch.zeros(()))
    products: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, left: Tensor, right: Tensor) -> None:
        left, right = left.double(), right.double()
        self.count += len(left)
        self.left = self.left + left.sum(0)
        self.right = self.right + right.sum(0)
        self.left_squares = self.left_squares + left.square().sum(0)
        self.right_squares = self.right_squares + right.square().sum(0)
        self.products = self.products + left.T @ right

    def covariance(self) -> Tensor:
        """Return the covariance of every pair of columns."""
        return self.products / self.count - (self.left / self.count)[:, None] * (self.right / self.count)

    def correlation(self) -> Tensor:
        """Return Pearson's correlation of every pair of columns; 0 for a column that is constant."""
        means = self.left / self.count, self.right / self.count
        spreads = [
            (squares / self.count - mean.square()).clamp(min=0).sqrt()
            for squares, mean in zip((self.left_squares, self.right_squares), means, strict=True)
        ]
        floors = [1e-7 * squares.div(self.count).sqrt() for squares in (self.left_squares, self.right_squares)]
        inverses = [torch.where(s > f, 1 / s, 0.0) for s, f in zip(spreads, floors, strict=True)]
        return self.covariance() * inverses[0][:, None] * inverses[1]


def _passes(
    left: nn.Module, right: nn.Module, batches: Iterable[Tensor]
) -> Iterator[tuple[tuple[Rows, Rows], tuple[Rows, Rows]]]:
    seen = False
    with eval_mode(left), eval_mode(right), torch.no_grad(), recorded(left) as ours, recorded(right) as theirs:
        for images in batches:
            for module, rows in ((left, ours), (right, theirs)):
                rows[0].clear()
                rows[1].clear()
                features = module(images.to(next(module.parameters()).device))
                rows[0][FEATURES] = rows[1][FEATURES] = features
            seen = True
            yield ours, theirs
    if not seen:
        raise ValueError("expected images to compare two networks on, got none")


def correlations(
    reference: nn.Module, other: nn.Module, spec: PermutationSpec, batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Measure how alike the units of two networks of one architecture fire on the same images.

    A unit's activations are the outputs of the layers that write it: before the non-linearity for hidden units,
    queries, keys and values for heads, every layer that adds to it for the residual stream. Of several layers the mean
    is taken.

    Args:
        reference: A network.
        other: Another one of its architecture.
        spec: Its groups, by the names of these modules.
        batches: Images, for both networks.

    Returns:
        Pearson's correlation by group, ``(n, n)`` in float64, reference x other; 0 for units that are constant.

    Raises:
        ValueError: If there are no images.
    """
    sums: dict[str, dict[tuple[str, int], _Sums]] = {key: {} for key in spec.groups}
    for (_, ours), (_, theirs) in _passes(reference, other, batches):
        for key, group in spec.groups.items():
            for axis in group.axes:
                if axis.axis == 0 and axis.name in ours:
                    parts = (rows[axis.name].chunk(axis.parts, dim=1)[axis.part] for rows in (ours, theirs))
                    sums[key].setdefault((axis.name, axis.part), _Sums()).add(*parts)
    found = {}
    for key, layers in sums.items():
        zero = torch.zeros(spec.groups[key].size, spec.groups[key].size, dtype=torch.float64)
        total = sum((layer.correlation().cpu() for layer in layers.values()), zero)
        found[key] = total / max(len(layers), 1)
    return found


def covariances(
    reference: nn.Module, other: nn.Module, spec: PermutationSpec, batches: Iterable[Tensor]
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Measure covariances of the units of two networks of one architecture, of groups without heads.

    Arguments and layers are those of ``correlations``; of several layers the mean is taken.

    Returns:
        By group: within the reference, within the other, and reference x other, each ``(n, n)`` in float64.
    """
    sums: dict[str, dict[str, _Sums]] = {key: {} for key, group in spec.groups.items() if not group.heads}
    for (_, ours), (_, theirs) in _passes(reference, other, batches):
        for key, layers in sums.items():
            for axis in spec.groups[key].axes:
                if axis.axis == 0 and axis.name in ours:
                    rows = torch.cat([ours[axis.name], theirs[axis.name]], dim=1)
                    layers.setdefault(axis.name, _Sums()).add(rows, rows)
    found = {}
    for key, layers in sums.items():
        size = spec.groups[key].size
        if layers:
            whole = sum((layer.covariance().cpu() for layer in layers.values()), torch.zeros(())) / len(layers)
            found[key] = whole[:size, :size], whole[size:, size:], whole[:size, size:]
    return found


def rotations(
    source: nn.Module, target: nn.Module, parts: Mapping[str, int], batches: Iterable[Tensor]
) -> dict[str, tuple[list[Tensor], Tensor]]:
    """Fit, for every linear layer, the semi-orthogonal maps of its outputs and inputs (orthogonal Procrustes).

    ``T = U V^T`` of the singular value decomposition of ``X_source^T X_target``, not centred.

    Args:
        source: A network.
        target: Another one with layers of the same names, perhaps of other widths.
        parts: Equal parts of a layer's outputs that are fitted apart, by the name of its weight: 3 for queries, keys
            and values in one matrix.
        batches: Images, for both networks.

    Returns:
        By name of the weight: a map for every part of the outputs, ``(out_source, out_target)``, and that of the
        inputs. Under ``FEATURES`` those of the networks' outputs.

    Raises:
        ValueError: If there are no images, or the networks see different numbers of positions.
    """
    sums: dict[str, tuple[list[_Sums], _Sums]] = {}
    for ours, theirs in _passes(source, target, batches):
        for name in ours[0].keys() & theirs[0].keys():
            if len(ours[0][name]) != len(theirs[0][name]):
                raise ValueError(
                    f"expected two networks with equally many positions at {name!r}, got {len(ours[0][name])} and "
                    f"{len(theirs[0][name])} rows: give both the same image size and patches"
                )
            count = parts.get(name, 1)
            outs, ins = sums.setdefault(name, ([_Sums() for _ in range(count)], _Sums()))
            ins.add(ours[0][name], theirs[0][name])
            pairs = zip(ours[1][name].chunk(count, 1), theirs[1][name].chunk(count, 1), strict=True)
            for total, (left, right) in zip(outs, pairs, strict=True):
                total.add(left, right)
    return {name: ([_procrustes(part) for part in outs], _procrustes(ins)) for name, (outs, ins) in sums.items()}


def _procrustes(sums: _Sums) -> Tensor:
    u, _, vh = torch.linalg.svd(sums.products, full_matrices=False)
    turned: Tensor = u @ vh
    return turned.cpu()
