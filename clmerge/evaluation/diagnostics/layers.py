"""What happens layer by layer when two models are averaged: barriers of single layers, and features of the average."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clmerge.evaluation.diagnostics.behaviour import Observer, barrier
from clmerge.evaluation.diagnostics.json_types import to_json
from clmerge.evaluation.diagnostics.vectors import layer_of, natural
from clmerge.weights import State, TaskVector

Batches = Sequence[tuple[Tensor, Tensor]]


def diagnose_layers(
    module: nn.Module,
    weights: Callable[[State], State],
    pair: tuple[State, State],
    batches: Batches,
    *,
    classes: Sequence[int] | None = None,
    num_points: int = 5,
) -> list[dict[str, Any]]:
    """Compare two models layer by layer.

    ``barrier`` (Adilova et al., arXiv 2307.06966): the rise of the loss above the line between the ends when one layer
    goes from the first model to the second, all others being the first's; ``barrier_of_second`` with all others the
    second's. ``llfc`` (Zhou et al., arXiv 2307.08286): one minus the cosine of the features of the averaged model and
    the average of the features, 0 if averaging weights averages features; ``features_apart`` is one minus the cosine
    of the two models' features, for comparison, and ``coefficient`` the length of the former as a multiple of the
    latter. With L layers, ``3 + 2 L (num_points - 1)`` passes over the images; memory holds the features of one batch.

    Args:
        module: A classifier as for :class:`clmerge.evaluation.diagnostics.Observer`, with a head for all tasks.
        weights: Maps a task vector to the module's weights.
        pair: The two models, as vectors from the base.
        batches: Images and global labels.
        classes: Global ids of the competing classes. Default: all that the head knows.
        num_points: Models along the way, both ends included; at least 3.

    Returns:
        One entry for every layer, a block of the network or what lies outside the blocks under its own name: ``name``,
        and the figures, None where they are undefined: layers whose module is not run by itself have no features.

    Raises:
        ValueError: If there are fewer than 3 points.
    """
    if num_points < 3:
        raise ValueError(f"expected 3 points or more, got num_points={num_points}")
    observer = Observer(module)
    first, second = pair
    layers: dict[str, list[str]] = {}
    for name in first:
        layers.setdefault(layer_of(name), []).append(name)
    features = _linearity(module, observer, weights, pair, batches, classes, layers)
    positions = [index / (num_points - 1) for index in range(num_points)]
    whole = [observer(weights(vector), batches, classes).loss for vector in pair]
    found = []
    for layer in sorted(layers, key=natural):
        barriers = []
        for own, other, loss in ((first, second, whole[0]), (second, first, whole[1])):
            moved = [_replaced(own, other, layers[layer], share) for share in positions[1:]]
            losses = [loss, *(observer(weights(vector), batches, classes).loss for vector in moved)]
            barriers.append(barrier(positions, losses))
        undefined = {"llfc": None, "features_apart": None, "coefficient": None}
        found.append(
            {"name": layer, "barrier": barriers[0], "barrier_of_second": barriers[1], **features.get(layer, undefined)}
        )
    document: list[dict[str, Any]] = to_json(found)
    return document


def _replaced(own: State, other: State, names: Sequence[str], share: float) -> TaskVector:
    """Return a vector whose named parameters went a share of the way to another's."""
    moved = dict(own)
    for name in names:
        moved[name] = (1.0 - share) * own[name] + share * other[name]
    return moved


def _linearity(
    module: nn.Module,
    observer: Observer,
    weights: Callable[[State], State],
    pair: tuple[State, State],
    batches: Batches,
    classes: Sequence[int] | None,
    layers: Mapping[str, Sequence[str]],
) -> dict[str, dict[str, float]]:
    modules = {name.replace("_orig_mod.", ""): part for name, part in module.named_modules()}
    watched = {layer: modules[layer] for layer in layers if layer in modules}
    first, second = pair
    middle = {name: 0.5 * (first[name] + second[name]) for name in first}
    sums = {layer: torch.zeros(6, dtype=torch.float64) for layer in watched}
    for batch in batches:
        seen = []
        for vector in (first, second, middle):
            with _outputs(watched) as outputs:
                observer(weights(vector), [batch], classes)
            seen.append(outputs)
        for layer in watched:
            if all(layer in outputs for outputs in seen):
                a, b, merged = (outputs[layer].double().flatten() for outputs in seen)
                mean = (a + b) / 2
                products = [merged @ mean, merged @ merged, mean @ mean, a @ b, a @ a, b @ b]
                sums[layer] += torch.stack(products).cpu()
    return {layer: _figures(*total.tolist()) for layer, total in sums.items() if total.any()}


def _figures(xy: float, xx: float, yy: float, ab: float, aa: float, bb: float) -> dict[str, float]:
    return {
        "llfc": 1.0 - xy / (xx * yy) ** 0.5 if xx * yy else float("nan"),
        "features_apart": 1.0 - ab / (aa * bb) ** 0.5 if aa * bb else float("nan"),
        "coefficient": xy / yy if yy else float("nan"),
    }


@contextmanager
def _outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect what modules return; of several tensors, the first."""
    found: dict[str, Tensor] = {}

    def keep(layer: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor):
                found[layer] = tensor.detach()

        return hook

    handles = [module.register_forward_hook(keep(layer)) for layer, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
