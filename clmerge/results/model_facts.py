"""What a model file says about itself in its header: backbone, tuning, rule, head, classes, templates, tasks."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import PurePath
from typing import Any

import clmerge
from clmerge.files import parse_json
from clmerge.results.contract import DATA_FREE
from clmerge.shapes import Check, anything, count, keyed, listed, maybe, record, text

KEY = "clmerge.model"  # in the metadata of a safetensors file, a JSON text


@dataclass(frozen=True)
class ModelFacts:
    """What a file of ``RUN/model`` holds.

    Attributes:
        model: Name of the model in the run's results.
        run: Name of the run.
        backbone: Class (``class``) and, where the run has a configuration, ``settings`` of the backbone; ``hub`` and
            ``revision`` where the base model is a repository of Hugging Face's hub.
        head: Class of the head.
        tuning: Mode of tuning with its settings, as text.
        rule: Merge rule (``merger`` and ``init_args``); None for a model that is not merged.
        calibration: Name of the calibration; empty if there is none.
        routing: Class and settings of the routing; None if there is none.
        classes: Names of all classes; their positions are the indices of logits.
        tasks: The merged tasks in order: ``name``, and ``classes`` as positions in ``classes``.
        data: Images that the model looked at beside the training of each task, as in ``results.json``.
        templates: Prompt templates by class, grouped: ``templates`` and the positions of their ``classes``.
        version: Version of clmerge that wrote the file.
    """

    model: str
    run: str
    backbone: Mapping[str, Any]
    head: str
    tuning: str
    rule: Mapping[str, Any] | None
    calibration: str
    classes: list[str]
    tasks: list[dict[str, Any]]
    data: str = DATA_FREE
    templates: list[dict[str, Any]] = field(default_factory=list)
    routing: Mapping[str, Any] | None = None
    version: str = clmerge.__version__

    @property
    def base_name(self) -> str:
        """The base model in words: its name and what it was loaded from, of a path the last part."""
        settings = self.backbone.get("settings", {})
        name = str(settings.get("name") or ("nano" if self.backbone["class"] == "OpenClip" else "the base model"))
        parts = [PurePath(name).name if name.startswith("local-dir:") else name]
        loaded = (settings.get(key) for key in ("pretrained", "checkpoint"))
        return " ".join([*parts, *(PurePath(one).name for one in loaded if isinstance(one, str))])

    def templates_of(self, class_id: int) -> list[str]:
        """Return the templates of a class; none if the head needs no text."""
        return next((list(each["templates"]) for each in self.templates if class_id in each["classes"]), [])

    def to_metadata(self) -> dict[str, str]:
        """Return the header's entry."""
        return {KEY: json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str) -> "ModelFacts | None":
        """Return what a header says; None if it says nothing, as those of older versions of clmerge.

        Args:
            metadata: The metadata of a safetensors file.
            where: The file, for messages.

        Raises:
            ValueError: If the entry is not what ``to_metadata`` writes.
        """
        if KEY not in metadata:
            return None
        found = parse_json(metadata[KEY], f"{where}: {KEY}")
        _CHECK(found, where)
        return cls(**{each.name: found[each.name] for each in fields(cls) if each.name in found})


_CHECK: Check = record(
    {
        "model": text,
        "run": text,
        "backbone": keyed(anything),
        "head": text,
        "tuning": text,
        "rule": maybe(keyed(anything)),
        "calibration": text,
        "classes": listed(text, filled=True),
        "tasks": listed(record({"name": text, "classes": listed(count)})),
        "templates": listed(record({"templates": listed(text), "classes": listed(count)})),
        "version": text,
    },
    {"data": text, "routing": maybe(keyed(anything))},  # older versions of clmerge wrote none
)
