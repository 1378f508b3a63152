"""The model card of an exported model: what it is, how good it is, what it saw, and how to load it."""

from collections.abc import Mapping, Sequence
from typing import Any

from clmerge.models import LinearHead, TangentModule
from clmerge.models.templates import GENERIC
from clmerge.names import visible
from clmerge.results.model_facts import ModelFacts
from clmerge.results.probe_table import probe_cell
from clmerge.results.results import SETTINGS, Results
from clmerge.results.table import percent
from clmerge.runs.exported import FACTS_FILE, FinalModel, Target, input_of

_MOST_NAMED = 50
_LOADED = {
    "open_clip": """\
```python
import open_clip

model, _, transform = open_clip.create_model_and_transforms("{place}")
tokenizer = open_clip.get_tokenizer("{place}")
```
""",
    "timm": """\
```python
import timm

model = timm.create_model("{place}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=model))
```
""",
    "onnx": """\
```python
import onnxruntime

session = onnxruntime.InferenceSession("{place}/model.onnx")
(logits,) = session.run(None, {{"images": images}})  # float32, (batch, 3, {height}, {width}), normalised as above
```
""",
    "routed": """\
```python
from clmerge.deploy.routing import load_routed

model = load_routed("{place}/model.safetensors")  # logits = model(images), (batch, 3, {height}, {width}), normalised
```
""",
    "safetensors": """\
```python
from safetensors.torch import load_file

model.load_state_dict(load_file("{place}/model.safetensors"))  # a {backbone} of the settings in clmerge.json
```
""",
}


def model_card(model: FinalModel, results: Results, target: Target, *, repo: str | None = None) -> str:
    """Return the card in Markdown, with the header that Hugging Face's hub reads.

    It names what the model was made from, its rule, the images that it looked at, its accuracies and what probes found.
    No licence is claimed.

    Args:
        model: The model.
        results: The results of its run.
        target: What was written.
        repo: Where it will be on the hub; default a folder on disk.
    """
    facts = model.facts
    own = input_of(model.module.backbone)
    height, width = own["size"]
    hub = "local-dir:FOLDER" if repo is None else f"hf-hub:{repo}"
    place = "FOLDER" if target in ("onnx", "safetensors") else hub
    library = {"open_clip": "open_clip", "timm": "timm", "onnx": "onnx"}.get(target, "clmerge")
    backbone = _called(facts.backbone["class"], facts.backbone.get("settings", {}))
    loaded = _LOADED["routed" if model.routed is not None and target == "safetensors" else target].format(
        place=place, height=height, width=width, backbone=facts.backbone["class"]
    )
    lines = [
        "---",
        f"library_name: {library}",
        f"pipeline_tag: {_pipeline(model, target)}",
        "tags: [clmerge, model-merging, continual-learning]",
        *([f"base_model: {facts.backbone['hub']}"] if facts.backbone.get("hub") else []),
        "---",
        "",
        f"# {_safe(facts.model)} of {_safe(facts.run or results.name)}",
        "",
        _what(facts) + f" Backbone: `{_safe(backbone)}`, tuned by `{_safe(facts.tuning)}`, head: `{facts.head}`.",
        "",
        f"- **Made from**: {_origin(model)}",
        f"- **Licence**: none is stated. That of the base model and of the data applies; {_safe(facts.base_name)} and "
        "the images are not clmerge's.",
        f"- **Input**: {height} x {width} pixels, RGB, mean {_numbers(own['mean'])}, std {_numbers(own['std'])}, "
        f"{own['interpolation']} interpolation.",
        f"- **Images that the model looked at beside the training of each task**: {_data(results, facts.model)}.",
        f"- **Classes** ({len(model.classes)}): {_names([facts.classes[index] for index in model.classes])}.",
        *_prompts(model),
        *_tangent(model),
        f"- Written by clmerge {facts.version}; `{FACTS_FILE}` holds classes, tasks, templates and settings.",
        "",
        "## Load",
        "",
        loaded,
        "## Accuracy",
        "",
        *_accuracy(results, facts.model),
        *_probes(results, facts.model),
    ]
    return "\n".join(lines) + "\n"


def _pipeline(model: FinalModel, target: Target) -> str:
    if target == "onnx" or (target == "timm" and isinstance(model.module.head, LinearHead)):
        return "image-classification"
    return "zero-shot-image-classification" if model.module.head.open_vocabulary else "image-feature-extraction"


def _what(facts: ModelFacts) -> str:
    name, rule = facts.model, facts.rule
    if rule is None:
        kinds = {"zero_shot": "The model before the first task.", "expert": "The un-merged model after the last task."}
        return kinds.get(name, "A model that was not merged.")
    called = _called(rule["merger"], rule["init_args"])
    calibrated = f", calibrated by `{facts.calibration}`" if facts.calibration else ""
    routed = ""
    if facts.routing is not None:
        how = _called(str(facts.routing["class_path"]), facts.routing["init_args"])
        routed = f"; in the mixed layers, low-rank experts of the tasks are weighed for every image by `{_safe(how)}`"
    return f"The fine-tuned models of several tasks, merged by `{_safe(called)}`{calibrated}{routed}."


def _called(name: str, settings: Mapping[str, Any]) -> str:
    def value(one: Any) -> str:
        if isinstance(one, Mapping) and "class_path" in one:
            return _called(str(one["class_path"]).rpartition(".")[2], one.get("init_args") or {})
        return repr(one)

    return f"{name}({', '.join(f'{key}={value(one)}' for key, one in settings.items())})"


def _data(results: Results, model: str) -> str:
    return results.model(model).data if model in results.models else "none"


def _prompts(model: FinalModel) -> list[str]:
    if not model.module.head.open_vocabulary:
        return []
    templates = model.facts.templates_of(model.classes[0]) or list(GENERIC)
    more = f" and {len(templates) - 1} more" if len(templates) > 1 else ""
    return [f"- **Prompts** of its text head: `{_safe(templates[0])}`{more}."]


def _tangent(model: FinalModel) -> list[str]:
    if not any(isinstance(part, TangentModule) for part in model.module.backbone.modules()):
        return []
    return [
        "- **Fine-tuned in tangent space**: the accuracies below are of the linearised model. The files hold the "
        "weights theta_0 + tau, with which an ordinary model computes another function; `clmerge evaluate` on them "
        "says how good it is."
    ]


def _accuracy(results: Results, model: str) -> list[str]:
    """Return a table of the final model's accuracy on the test images of every task."""
    lines = [
        "On the test images of each task after the last one, in %, beside the model before the first task."
        if "zero_shot" in results.models
        else "On the test images of each task after the last one, in %.",
        "",
        "| model | reading | " + " | ".join(_safe(name) for name in results.task_labels()) + " | average |",
        "|---|---|" + "---|" * (len(results.tasks) + 1),
    ]
    for name in dict.fromkeys((model, "zero_shot")):
        for setting in SETTINGS if name in results.models else ():
            row = results.matrix(name, setting)[-1].tolist()
            cells = [percent(value) for value in (*row, sum(row) / len(row))]
            lines.append(f"| {_safe(name)} | {setting.replace('_', '-')} | " + " | ".join(cells) + " |")
    return [*lines, "", "Task-agnostic: all classes compete. Task-aware: those of the image's task."]


def _origin(model: FinalModel) -> str:
    facts = model.facts
    base = f"the base model `{_safe(facts.base_name)}`"
    if facts.backbone.get("hub"):
        commit = f" at commit `{facts.backbone['revision']}`" if facts.backbone.get("revision") else ""
        base += f" (`{_safe(str(facts.backbone['hub']))}` on Hugging Face's hub{commit})"
    if facts.model == "zero_shot" or not facts.tasks:
        return f"{base}."
    tasks = _names([str(task["name"]) for task in facts.tasks])
    return f"{base} and its fine-tuning on {len(facts.tasks)} tasks: {tasks}."


def _probes(results: Results, model: str) -> list[str]:
    """Return a table of what probes found about the final model."""
    found = results.model(model).probes if model in results.models else {}
    rows = [
        f"| {_safe(name)} | {probe_cell(one)} | {one.get('better') or ''} |"
        for name, one in found.items()
        if "value" in one
    ]
    if not rows:
        return []
    note = "Shares are in percent, with a 95 % Wilson interval."
    return ["", "## Probes", "", "| probe | value | better |", "|---|---|---|", *rows, "", note]


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(_safe, names[:_MOST_NAMED])) + more


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _safe(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    return visible(text).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
