"""A routed model: a backbone with mixed layers, a head and routers; one module from images to logits."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

import clmerge.models
from clmerge.deploy.routing.mixture import Gates, MixtureLinear
from clmerge.deploy.routing.routers import LayerRouter, Query, Router, router_of
from clmerge.files import parse_json
from clmerge.models.heads import CosineHead, Head, LinearHead, ZeroShotHead
from clmerge.results.model_facts import ModelFacts
from clmerge.shapes import Check, anything, count, flag, keyed, listed, maybe, record, text
from clmerge.weights import load_metadata, load_tensors, save_tensors
from clmerge.weights.parametrization import folded
from clmerge.weights.task_vector import State

KEY = "clmerge.routed"  # in the metadata of a safetensors file, a JSON text
_BACKBONE, _ENCODER = "backbone.", "encoder."


class RoutedModel(nn.Module):
    """Answer every image with weights that are mixed for it alone: ``forward(images)`` returns logits.

    Mixed layers are theta_0 plus the experts under gates; all other weights are the merged ones. The gates of an image
    depend on that image alone.

    Args:
        backbone: The backbone, with mixed layers in place.
        head: Maps features to logits.
        tasks: Indices of the tasks whose experts are mixed, in the order of the gates.
        router: Gates of all layers by image; none if the layers have routers of their own.
        encoder: The backbone of theta_0, for a router that looks at its features.

    Attributes:
        layers: The mixed layers by name.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        *,
        tasks: Sequence[int],
        router: Router | None = None,
        encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.router = router
        self.encoder = encoder
        self.tasks = tuple(tasks)
        self.layers = {part.name: part for part in backbone.modules() if isinstance(part, MixtureLinear)}
        if not self.layers:
            raise ValueError(f"expected mixed layers in {type(backbone).__name__}, got none")
        self._gates = list({id(layer.gates): layer.gates for layer in self.layers.values()}.values())
        found = {id(gates.router): gates.router for gates in self._gates if gates.router is not None}
        self.layer_routers = nn.ModuleList(router for router in found.values() if isinstance(router, LayerRouter))
        if (router is None) == (not self.layer_routers):
            raise ValueError("expected a router of the model or routers of its layers, and not both")
        self.share_tensors()
        self.requires_grad_(False)
        self.eval()

    def share_tensors(self) -> None:
        """Have the encoder hold the very parameters that it shares with the backbone: a device needs them once."""
        own = {one.data_ptr(): one for one in self.backbone.parameters() if one.numel()}
        for part in self.encoder.modules() if self.encoder is not None else ():
            for name, parameter in part._parameters.items():
                same = None if parameter is None else own.get(parameter.data_ptr())
                if same is not None and parameter is not None and same.shape == parameter.shape:
                    part._parameters[name] = same

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, C)`` for images ``(B, channels, height, width)``."""
        if self.router is not None:
            value = self.router.gates(Query(images, self.encode, self.answer))
            for gates in self._gates:
                gates.value = value
        return self._logits(images)

    def encode(self, images: Tensor) -> Tensor:
        """Return the features of theta_0, ``(B, D)``.

        Raises:
            RuntimeError: If the model does not keep theta_0's encoder.
        """
        if self.encoder is None:
            raise RuntimeError("expected a routed model with the encoder of theta_0, got one whose router needs none")
        found: Tensor = self.encoder(images)
        return found

    def answer(self, images: Tensor, gates: Tensor) -> Tensor:
        """Return logits ``(B, C)`` under given gates ``(B, T)`` in all layers, instead of the router's."""
        try:
            for one in self._gates:
                one.forced = gates
            return self._logits(images)
        finally:
            for one in self._gates:
                one.forced = None

    def _logits(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(self.backbone(images))
        return found

    def choices(self) -> Tensor:
        """Return where the last batch was routed to: the share of layers and tokens that prefer a task, ``(B, T)``.

        Equal gates share a choice.
        """
        found = []
        for gates in self._gates:
            assert gates.value is not None
            best = (gates.value == gates.value.amax(dim=-1, keepdim=True)).float()
            best = best / best.sum(dim=-1, keepdim=True)
            found.append(best if best.ndim == 2 else best.flatten(1, -2).mean(dim=1))
        return torch.stack(found).mean(dim=0)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors; what the encoder of theta_0 shares with the model counts once."""
        own = {tensor.data_ptr(): tensor.nbytes for tensor in (*self.parameters(), *self.buffers()) if tensor.numel()}
        return sum(own.values())

    def save(self, path: str | os.PathLike[str], facts: ModelFacts | None = None) -> None:
        """Write the model to one safetensors file, from which ``load_routed`` builds it again.

        Names are ``backbone.*`` (with ``a``, ``b`` and ``delta_bias`` of mixed layers), ``head.*``, ``router.*``,
        ``layer_routers.*``, and ``encoder.*`` where theta_0 differs from the backbone.

        Args:
            path: The file.
            facts: What the model is, for the header.
        """
        state = self.state_dict()
        for name in [name for name in state if name.startswith(_ENCODER)]:
            other = state.get(_BACKBONE + name.removeprefix(_ENCODER))
            if other is not None and other.shape == state[name].shape and torch.equal(other, state[name]):
                del state[name]
        routers = list(self.layer_routers)
        structure = {
            "tasks": list(self.tasks),
            "router": None if self.router is None else self.router.spec(),
            "layer_routers": [router.spec() for router in routers if isinstance(router, LayerRouter)],
            "layers": [
                {
                    "name": name,
                    "gates": self._gates.index(layer.gates),
                    "leads": layer.gates.router is not None and layer.gates.leader == name,
                    "router": next((i for i, one in enumerate(routers) if one is layer.gates.router), None),
                }
                for name, layer in self.layers.items()
            ],
            "encoder": self.encoder is not None,
            "head": _head_spec(self.head),
        }
        metadata = {KEY: json.dumps(structure, sort_keys=True)} | ({} if facts is None else facts.to_metadata())
        save_tensors(path, state, metadata)


_CHECK: Check = record(
    {
        "tasks": listed(count, filled=True),
        "router": maybe(keyed(anything)),
        "layer_routers": listed(keyed(anything)),
        "layers": listed(record({"name": text, "gates": count, "leads": flag, "router": maybe(count)}), filled=True),
        "encoder": flag,
        "head": record({"class": text, "settings": keyed(anything), "classes": count}),
    }
)


def is_routed(metadata: Mapping[str, str]) -> bool:
    """Return whether a file's header is that of a routed model."""
    return KEY in metadata


def load_routed(path: str | os.PathLike[str], backbone: nn.Module | None = None) -> RoutedModel:
    """Build a routed model from its file; neither Lightning nor a run folder is needed.

    Args:
        path: A file of ``RoutedModel.save``; those in ``RUN/model`` say which backbone they are of.
        backbone: A new backbone of the same architecture, whatever its weights; it is changed. Default: built by name
            and settings from the header, without pretrained weights.

    Raises:
        ValueError: If it is not the file of a routed model, names no backbone, or does not fit the backbone.
    """
    metadata = load_metadata(path)
    if KEY not in metadata:
        raise ValueError(f"expected the file of a routed model, got {os.fspath(path)}, whose header has no {KEY!r}")
    where = f"{os.fspath(path)}: {KEY}"
    structure: Any = parse_json(metadata[KEY], where)
    _CHECK(structure, where)
    state = load_tensors(path)
    if backbone is None:
        backbone = _new_backbone(ModelFacts.from_metadata(metadata, os.fspath(path)), os.fspath(path))
    encoder = copy.deepcopy(backbone) if structure["encoder"] else None
    routers = [router_of(spec, where) for spec in structure["layer_routers"]]
    shared: dict[int, Gates] = {}
    for layer in structure["layers"]:
        own = None if layer["router"] is None else routers[layer["router"]]
        gates = shared.setdefault(layer["gates"], Gates(own))
        if layer["leads"]:
            gates.leader = layer["name"]
        _put_empty(backbone, layer["name"], gates, state, where)
    router = None if structure["router"] is None else router_of(structure["router"], where)
    head = _new_head(structure["head"], backbone, where)
    assert router is None or isinstance(router, Router)
    model = RoutedModel(backbone, head, tasks=structure["tasks"], router=router, encoder=encoder)
    for name in model.state_dict():
        if name.startswith(_ENCODER) and name not in state:
            state[name] = state[_BACKBONE + name.removeprefix(_ENCODER)]
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"expected the tensors of the model that {where} describes, got others: {error}") from error
    model.share_tensors()
    return model.requires_grad_(False)


def _put_empty(backbone: nn.Module, name: str, gates: Gates, state: State, where: str) -> None:
    own = f"{_BACKBONE}{name}."
    try:
        tensors = {key: state[own + key] for key in ("weight", "a", "b")}
        backbone.get_submodule(name)
    except (KeyError, AttributeError) as error:
        raise ValueError(f"expected the mixed layer {name} in {where} and in its backbone, got none") from error
    bias, delta = state.get(f"{own}bias"), state.get(f"{own}delta_bias")
    backbone.set_submodule(name, MixtureLinear(tensors["weight"], bias, tensors["a"], tensors["b"], delta, gates, name))


def _new_backbone(facts: ModelFacts | None, path: str) -> nn.Module:
    kinds: dict[str | None, dict[str, Any]] = {
        "OpenClip": {"pretrained": None},
        "Timm": {"pretrained": False, "checkpoint": None},
    }
    name = None if facts is None else str(facts.backbone.get("class"))
    if facts is None or name not in kinds:
        raise ValueError(f"expected a file that names a backbone of open_clip or timm, got {path}; pass backbone=")
    settings = {**facts.backbone.get("settings", {}), **kinds[name], "weights": None}
    found: nn.Module = getattr(clmerge.models, str(name))(**settings)
    return found


def _head_spec(head: nn.Module) -> dict[str, Any]:
    """Return class, settings and number of classes of a head, in JSON types."""
    if not isinstance(head, ZeroShotHead | LinearHead | CosineHead):
        raise ValueError(f"expected a head of clmerge to save, got {type(head).__name__}")
    classes = len(head.weight) if isinstance(head, ZeroShotHead) else head.num_classes
    settings = {"logit_scale": head.logit_scale} if isinstance(head, CosineHead) else {}
    return {"class": type(head).__name__, "settings": settings, "classes": classes}


def _new_head(spec: Mapping[str, Any], backbone: nn.Module, where: str) -> Head:
    heads = ("ZeroShotHead", "LinearHead", "CosineHead")
    if spec["class"] not in heads:
        raise ValueError(f"expected one of the heads {', '.join(heads)} in {where}, got {spec['class']!r}")
    head: Head = getattr(clmerge.models, spec["class"])(**spec["settings"])
    if not head.open_vocabulary:
        whole: Any = backbone
        head.build(whole, spec["classes"], ())
    return head


def dense_copy(backbone: nn.Module) -> nn.Module:
    """Return a copy of a backbone with ordinary layers, which shares all tensors and needs no gradients.

    Args:
        backbone: A backbone, tuned in any mode.
    """
    with folded(backbone) as whole:
        shared: dict[int, Any] = {}
        for parameter in whole.parameters():
            shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        shared |= {id(buffer): buffer for buffer in whole.buffers()}
        return copy.deepcopy(whole, shared).eval()


def put_state(model: nn.Module, state: State) -> None:
    """Put other tensors into a module in place of its own, without copies; the others stay shared.

    Args:
        model: The module.
        state: Parameters and buffers by name.

    Raises:
        RuntimeError: If the module lacks one.
    """
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        part = model.get_submodule(path)
        if leaf in part._parameters:
            part._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        elif leaf in part._buffers:
            part._buffers[leaf] = tensor
        else:
            raise RuntimeError(f"expected {name!r} in {type(model).__name__}, got none of that name")
