"""Specifications of architectures, written out by their parameters' names; ``spec_of`` finds the one of a model."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from clmerge.alignment.spec import Axis, Group, PermutationSpec
from clmerge.alignment.vit import open_clip_spec, timm_vit_spec

__all__ = ["mlp_spec", "resnet_spec", "spec_of"]


def spec_of(model: nn.Module, *, readers: Sequence[str] | None = None) -> PermutationSpec:
    """Return the specification of a model: an open_clip or timm ViT, a ResNet, or an MLP, alone or within a module.

    The outputs of the encoder keep their order, so that whatever reads them is untouched; with ``readers`` the linear
    layers on the features are part of the symmetry instead.

    Args:
        model: The model. The first encoder among its modules is taken; parameters outside it are fixed.
        readers: Names of the weights, classes x features, that read the features. With an empty list the features may
            change order, and whatever reads them must follow (``PermutationSpec.outputs`` names their group).

    Raises:
        ValueError: If there is no encoder with a known table, or a parameter of it is not covered; it is named.

    Example:
        >>> sorted(spec_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))).groups)
        ['hidden.0']
    """
    for path, module in model.named_modules():
        table = _table_of(module)
        if table is not None and (table is not mlp_spec or _holds_all(module, model, readers or ())):
            spec = table(module)
            prefix = f"{path}." if path else ""
            _check_covered(spec, module, prefix)
            spec = spec.prefixed(prefix)
            if readers is None:
                spec = spec.without([spec.outputs] if spec.outputs else [])
            elif readers:
                spec = _with_readers(spec, model, readers)
            outside = [name for name, _ in _tensors(model) if name not in spec.names]
            return PermutationSpec(spec.groups, (*spec.fixed, *outside), spec.outputs)
    raise ValueError(
        f"expected an open_clip or timm VisionTransformer, a ResNet or an MLP (nn.Sequential), got "
        f"{type(model).__name__}: write its PermutationSpec by hand"
    )


def _table_of(module: nn.Module) -> Callable[[Any], PermutationSpec] | None:
    kind = type(module)
    place = f"{kind.__module__}.{kind.__qualname__}"
    known: dict[str, Callable[[Any], PermutationSpec]] = {
        "open_clip.transformer.VisionTransformer": open_clip_spec,
        "timm.models.vision_transformer.VisionTransformer": timm_vit_spec,
        "timm.models.resnet.ResNet": resnet_spec,
        "torchvision.models.resnet.ResNet": resnet_spec,
    }
    layers = list(module.children())
    leaves = not any(list(layer.children()) for layer in layers)
    if kind is nn.Sequential and leaves and any(isinstance(layer, nn.Linear) for layer in layers):
        return mlp_spec
    return known.get(place)


def _holds_all(module: nn.Module, model: nn.Module, readers: Sequence[str]) -> bool:
    """Return whether layers in a row are the whole encoder, and not a part of one that has no table."""
    inside = {id(tensor) for tensor in module.parameters()}
    return all(id(tensor) in inside or name in readers for name, tensor in model.named_parameters())


def _tensors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _check_covered(spec: PermutationSpec, module: nn.Module, prefix: str) -> None:
    own = dict(_tensors(module))
    for name in own:
        if name not in spec.names:
            raise ValueError(
                f"expected a {type(module).__name__} whose parameters are all known, got {prefix + name!r}, which no "
                "group of units covers: a map without it would change the function. Write its PermutationSpec by hand"
            )
    spec.check({name: own[name] for name in spec.moved_names if name in own}, origin=type(module).__name__, whole=True)


def _with_readers(spec: PermutationSpec, model: nn.Module, readers: Sequence[str]) -> PermutationSpec:
    own = dict(_tensors(model))
    if unknown := [name for name in readers if name not in own]:
        raise ValueError(f"expected weights of the model as readers of its features, got {unknown[0]!r}")
    if not spec.outputs:
        raise ValueError(f"expected features whose order is free, for {readers[0]!r} to follow, got fixed ones")
    return spec.extended({spec.outputs: tuple(Axis(name, 1, reads=True) for name in readers)})


def mlp_spec(module: nn.Sequential) -> PermutationSpec:
    """Return the specification of linear and convolutional layers in a row, with norms and activations between.

    Args:
        module: The layers. A linear layer after ``nn.Flatten`` reads whole feature maps.

    Raises:
        ValueError: For other layers with parameters.
    """
    axes: dict[str, list[Axis]] = {}
    sizes: dict[str, int] = {}
    current, width, fixed = "", 0, []
    for name, layer in module.named_children():
        own = [f"{name}.{key}" for key, _ in _tensors(layer)]
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            if not isinstance(layer, nn.Linear) and layer.groups != 1:
                raise ValueError(f"expected convolutions without groups, got {name!r}")
            inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            if current:
                axes[current].append(Axis(f"{name}.weight", 1, spread=inputs // width, reads=True))
            current, width = f"hidden.{name}", outputs
            axes[current], sizes[current] = [Axis(key, 0) for key in own], width
        elif own and isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm)):
            counts = [key for key in own if key.endswith("num_batches_tracked")]
            fixed += counts
            if current:
                axes[current] += [Axis(key, 0) for key in own if key not in counts]
            else:
                fixed += [key for key in own if key not in counts]
        elif own:
            raise ValueError(f"expected linear layers, convolutions and norms, got {type(layer).__name__} {name!r}")
    pinned = axes.pop(current, [])
    covered = {axis.name for found in axes.values() for axis in found}
    fixed += [axis.name for axis in pinned if axis.name not in covered]
    return PermutationSpec({key: Group(sizes[key], tuple(axes[key])) for key in axes}, tuple(fixed))


def resnet_spec(module: Any) -> PermutationSpec:
    """Return the specification of a ResNet of torchvision or timm; channels of a stage's stream move together.

    Args:
        module: The network, with or without its classifier ``fc``.
    """
    axes: dict[str, list[Axis]] = {}
    own = dict(_tensors(module))
    if not hasattr(module.conv1, "weight"):
        raise ValueError(
            f"expected a ResNet with one convolution as its stem, got {type(module.conv1).__name__} at 'conv1', whose "
            "parameters no group of units covers"
        )

    def norm(name: str, group: str) -> None:
        for key in ("weight", "bias", "running_mean", "running_var"):
            axes.setdefault(group, []).append(Axis(f"{name}.{key}", 0))

    def convolution(name: str, source: str, target: str) -> None:
        if source:
            axes.setdefault(source, []).append(Axis(f"{name}.weight", 1, reads=True))
        axes.setdefault(target, []).append(Axis(f"{name}.weight", 0))

    convolution("conv1", "", "stem")
    norm("bn1", "stem")
    stream = "stem"
    for stage in range(1, 5):
        for index, block in enumerate(getattr(module, f"layer{stage}")):
            name = f"layer{stage}.{index}"
            target = f"layer{stage}" if getattr(block, "downsample", None) is not None else stream
            count = 3 if hasattr(block, "conv3") else 2
            source = stream
            for number in range(1, count + 1):
                group = target if number == count else f"{name}.inner{number}"
                convolution(f"{name}.conv{number}", source, group)
                norm(f"{name}.bn{number}", group)
                source = group
            if block.downsample is not None:
                convolution(f"{name}.downsample.0", stream, target)
                norm(f"{name}.downsample.1", target)
            stream = target
    outputs = stream
    fixed = [name for name in own if name.endswith("num_batches_tracked")]
    if "fc.weight" in own:
        axes[stream].append(Axis("fc.weight", 1, reads=True))
        fixed.append("fc.bias")
        outputs = ""
    groups = {
        key: Group(next(own[a.name].shape[a.axis] for a in found if a.name in own), tuple(found))
        for key, found in axes.items()
    }
    return PermutationSpec(groups, tuple(name for name in fixed if name in own), outputs)
