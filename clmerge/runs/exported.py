"""Write a model of a finished run as the files that other libraries load."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from clmerge.deploy.routing import RoutedModel
from clmerge.models import Backbone, LinearHead, OpenClip, Timm
from clmerge.models.backbone import NANO
from clmerge.models.tuning.adapters import AdapterLinear
from clmerge.results.model_facts import ModelFacts
from clmerge.training.module import ContinualClassifier
from clmerge.weights import save_tensors, write_json_atomic
from clmerge.weights.parametrization import folded

Target: TypeAlias = Literal["safetensors", "open_clip", "timm", "hf-folder", "onnx"]
TARGETS: tuple[str, ...] = get_args(Target)
FACTS_FILE = "clmerge.json"
_OPSET = 18


@dataclass(frozen=True)
class FinalModel:
    """One model of a finished run, with its weights in the module.

    Attributes:
        module: The classifier.
        facts: What it is.
        classes: Indices of the classes that it chooses from.
        routed: The model, if it is a routed one; the module then has other weights.
    """

    module: ContinualClassifier
    facts: ModelFacts
    classes: list[int]
    routed: RoutedModel | None = None


def export(model: FinalModel, target: Target, folder: Path) -> Target:
    """Write the files of a model into a folder.

    Args:
        model: The model.
        target: ``safetensors`` (weights under the backbone's own names, the learned head beside them), ``open_clip``
            or ``timm`` (a folder as that library loads it from disk or from the hub), ``hf-folder`` (the one of the
            two that fits the backbone), or ``onnx`` (from transformed images to logits).
        folder: A new or empty folder, which is made.

    Returns:
        The target, with ``hf-folder`` resolved.

    Raises:
        FileExistsError: If the folder holds something.
        ValueError: If the target does not fit the backbone, or needs packages that are not installed.
    """
    backbone = model.module.backbone
    if target == "hf-folder":
        target = "open_clip" if isinstance(backbone, OpenClip) else "timm"
    if model.routed is not None and target not in ("safetensors", "onnx"):
        raise ValueError(
            f"expected --to safetensors or --to onnx for {model.facts.model}, whose weights differ from image to "
            f"image, got --to {target}: no model of another library is like it"
        )
    _check(backbone, target)
    require_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = model.facts.to_metadata()
    head = None if model.module.head.open_vocabulary else dict(model.module.head.state_dict())
    if model.routed is not None:
        if target == "safetensors":
            model.routed.save(folder / "model.safetensors", model.facts)
        else:
            _write_onnx(folder / "model.onnx", model)
        write_json_atomic(folder / FACTS_FILE, asdict(model.facts) | {"chosen_from": model.classes})
        return target
    with folded(backbone), torch.no_grad():
        weights = {key: tensor.detach().cpu() for key, tensor in backbone.model.state_dict().items()}
        if target == "safetensors":
            save_tensors(folder / "model.safetensors", weights, metadata=metadata)
        elif target == "open_clip":
            assert isinstance(backbone, OpenClip)
            write_json_atomic(folder / "open_clip_config.json", _open_clip_config(backbone))
            save_tensors(folder / "open_clip_model.safetensors", weights, metadata=metadata | {"format": "pt"})
            if backbone.name == "nano":
                vocabulary = "bpe_simple_vocab.txt.gz"
                (folder / vocabulary).write_bytes((NANO / vocabulary).read_bytes())
        elif target == "timm":
            assert isinstance(backbone, Timm)
            if (classifier := _timm_classifier(model)) is not None:
                weights, head = weights | classifier, None
            _write_timm_config(folder / "config.json", model, classifier)
            save_tensors(folder / "model.safetensors", weights, metadata=metadata | {"format": "pt"})
        else:
            _write_onnx(folder / "model.onnx", model)
            head = None
    if head is not None:
        save_tensors(folder / "head.safetensors", head, metadata=metadata)
    write_json_atomic(folder / FACTS_FILE, asdict(model.facts) | {"chosen_from": model.classes})
    return target


def require_empty(folder: Path) -> None:
    """Raise a FileExistsError if there is a folder that holds something, or a file, at a path."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"expected a new or empty folder to write to, got {folder}, which holds something")


def _check(backbone: Backbone, target: Target) -> None:
    wanted = {"open_clip": OpenClip, "timm": Timm}
    if target in wanted and not isinstance(backbone, wanted[target]):
        raise ValueError(f"expected a backbone of {target} for --to {target}, got {type(backbone).__name__}")
    if target in wanted and any(isinstance(part, AdapterLinear) for part in backbone.modules()):
        raise ValueError(
            f"expected weights that a model of {target} has, got bottleneck adapters, which stay part of the model: "
            "use --to onnx or --to safetensors"
        )
    if target == "onnx" and (missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]):
        raise ValueError(f"expected the package {missing[0]} for --to onnx, got none: pip install 'clmerge[onnx]'")


def input_of(backbone: Backbone) -> dict[str, Any]:
    """Return the input of a backbone: ``size`` as height and width, ``mean``, ``std``, ``interpolation``."""
    size: Any
    if isinstance(backbone, OpenClip):
        import open_clip

        with folded(backbone):  # a tower in tangent space does not say
            config = open_clip.get_model_preprocess_cfg(backbone.model)
        size = config["size"]
    elif isinstance(backbone, Timm):
        from timm.data import resolve_data_config

        config = resolve_data_config({}, model=backbone.model)
        size = backbone.image_size or config["input_size"][1:]
    else:
        raise ValueError(
            f"expected a backbone of open_clip or timm, whose input is known, got {type(backbone).__name__}"
        )
    height, width = (size, size) if isinstance(size, int) else size
    numbers = {key: [float(value) for value in config[key]] for key in ("mean", "std")}
    return {"size": [int(height), int(width)], **numbers, "interpolation": config["interpolation"]}


def _open_clip_config(backbone: OpenClip) -> dict[str, Any]:
    """Return the ``open_clip_config.json`` of a model, with the size of image that it takes now."""
    import open_clip

    source = f"local-dir:{NANO}" if backbone.name == "nano" else backbone.name
    config = json.loads(json.dumps(open_clip.get_model_config(source)))
    size = input_of(backbone)["size"]
    config["vision_cfg"]["image_size"] = size[0] if size[0] == size[1] else size
    config["vision_cfg"].pop("timm_model_pretrained", None)  # the weights are beside it
    preprocess = open_clip.get_model_preprocess_cfg(backbone.model)
    return {"model_cfg": config, "preprocess_cfg": preprocess}


def _timm_classifier(model: FinalModel) -> dict[str, Tensor] | None:
    """Return a linear head as the classifier that timm would put there; None if it is none."""
    head, backbone = model.module.head, model.module.backbone
    name: Any = backbone.model.pretrained_cfg.get("classifier")  # type: ignore[operator, union-attr]
    if not isinstance(head, LinearHead) or not isinstance(name, str):
        return None
    rows = torch.cat([block.detach().cpu() for block in head.blocks])
    place = {class_id: row for row, class_id in enumerate(head.known.tolist())}
    chosen = rows[[place[class_id] for class_id in model.classes]]
    return {f"{name}.weight": chosen[:, :-1].contiguous(), f"{name}.bias": chosen[:, -1].contiguous()}


def _write_timm_config(file: Path, model: FinalModel, classifier: Mapping[str, Tensor] | None) -> None:
    import timm
    from timm.models import save_for_hf

    backbone: Any = model.module.backbone
    whole = backbone.model
    if classifier is not None:
        whole = timm.create_model(backbone.name, num_classes=len(model.classes), **backbone.size)
    names = [model.facts.classes[class_id] for class_id in model.classes]
    config = {"label_names": names} if classifier is not None else {}
    size = {"input_size": (3, *input_of(backbone)["size"])}
    save_for_hf(whole, str(file.parent), model_config=config, safe_serialization=True, data_config=size)


class _Logits(nn.Module):
    """From transformed images to the logits of the chosen classes."""

    def __init__(self, model: FinalModel) -> None:
        super().__init__()
        own = nn.Sequential(model.module.backbone, model.module.head)
        self.whole = own if model.routed is None else model.routed
        self.chosen: Tensor
        self.register_buffer("chosen", torch.tensor(model.classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.whole(images)
        return logits[:, self.chosen]


def _write_onnx(file: Path, model: FinalModel) -> None:
    import warnings

    height, width = input_of(model.module.backbone)["size"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        torch.onnx.export(
            _Logits(model).eval().cpu(),
            (torch.zeros(2, 3, height, width),),
            str(file),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            opset_version=_OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
