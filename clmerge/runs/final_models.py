"""Save the final models of a run as files that load strictly into the backbone and say what they are."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from clmerge.bounded_yaml import load_yaml
from clmerge.deploy.describe import describe_merger
from clmerge.deploy.routing import RoutedModel
from clmerge.models import Backbone
from clmerge.results.model_facts import ModelFacts
from clmerge.results.results import ADAPTERS, EXPERT, HEAD
from clmerge.results.run_folder import RunFolder
from clmerge.runs.attested import attest_models
from clmerge.runs.learner_parts import LearnerParts
from clmerge.streams import Stream
from clmerge.weights import save_tensors
from clmerge.weights.parametrization import folded
from clmerge.weights.task_vector import State


def save_models(
    run: RunFolder, learner: LearnerParts, more: Mapping[str, State], routed: Mapping[str, RoutedModel]
) -> None:
    """Write dense weights of the backbone under every merger to ``model/``, and the head if it was trained.

    The header of every file holds a :class:`ModelFacts`; ``models.intoto.json`` says what the files were made from.

    Args:
        run: The run folder.
        learner: The learner after the last task.
        more: Tensors of the files of calibrated models, by file name.
        routed: Routed models by name.
    """
    module, merge = learner.module, learner.merge
    facts = _facts(run, learner)
    prefix, vectors = "backbone.model.", run.manifest.data
    with folded(module.backbone):
        whole = dict(module.backbone.model.state_dict())
    for name, merger in learner.mergers.items():
        merged = {key.removeprefix(prefix): value for key, value in merge.merged_state(name).items()}
        rule = {"merger": type(merger).__name__, "init_args": merger.settings()}
        data = describe_merger(merger, vectors=vectors, adaptation=learner.adaptation)["data"]
        own = replace(facts, model=name, rule=rule, data=data)
        metadata = {"merger": repr(merger), "tuning": repr(module.tuning), **own.to_metadata()}
        save_tensors(run.model(name), {**whole, **merged}, metadata=metadata)
    for name, tensors in more.items():
        model = name.removesuffix(f"-{HEAD}").removesuffix(f"-{ADAPTERS}")
        label, _, calibration = model.rpartition("+")
        merger = learner.mergers[label]
        rule = {"merger": type(merger).__name__, "init_args": merger.settings()}
        one = learner.calibrated.calibrations[calibration]
        data = describe_merger(merger, vectors=vectors, adaptation=learner.adaptation, calibration=one)["data"]
        own = replace(facts, model=model, rule=rule, calibration=calibration, data=data)
        save_tensors(run.model(name), tensors, metadata=own.to_metadata())
    for name, routed_model in routed.items():
        label, _, kind = name.rpartition("+")
        merger, routing = learner.mergers[label], learner.routed.routings[kind]
        rule = {"merger": type(merger).__name__, "init_args": merger.settings()}
        settings = {"class_path": type(routing).__name__, "init_args": routing.settings()}
        data = describe_merger(merger, vectors=vectors, adaptation=learner.adaptation, routing=routing)["data"]
        routed_model.save(run.model(name), replace(facts, model=name, rule=rule, routing=settings, data=data))
    expert = replace(facts, model=EXPERT, data=vectors)
    if merge.deploy == EXPERT:
        note = {"merger": "none: the last task's un-merged model"}
        save_tensors(run.model(EXPERT), whole, metadata={**note, **expert.to_metadata()})
    if not module.head.open_vocabulary:
        save_tensors(run.model(HEAD), module.head.state_dict(), metadata=expert.to_metadata())
    attest_models(run, learner, facts)


def _facts(run: RunFolder, learner: LearnerParts) -> ModelFacts:
    """Return what all models of a run have in common."""
    module, stream = learner.module, learner.stream
    config = load_yaml(run.manifest.config, str(run.config)) if run.manifest.config else {}
    found: Any = (config.get("model") or {}).get("backbone") or {}
    settings = {"settings": found.get("init_args") or {}} if isinstance(found, Mapping) and found else {}
    return ModelFacts(
        model="",
        run=str(config.get("name", "")),
        backbone={"class": type(module.backbone).__name__, **settings, **_from_hub(module.backbone)},
        head=type(module.head).__name__,
        tuning=repr(module.tuning),
        rule=None,
        calibration="",
        classes=list(stream.class_names),
        tasks=[{"name": task.name, "classes": list(task.classes)} for task in learner.tasks],
        templates=grouped_templates(stream) if module.head.open_vocabulary else [],
    )


def _from_hub(backbone: Backbone) -> dict[str, str]:
    """Return the hub's repository and commit that the base model is from; nothing if it is from elsewhere."""
    found = {"hub": backbone.hub, "revision": backbone.revision}
    return {key: value for key, value in found.items() if value}


def grouped_templates(stream: Stream) -> list[dict[str, Any]]:
    """Return the prompt templates of a stream with the ids of the classes that have them."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for class_id in range(len(stream.class_names)):
        groups.setdefault(stream.templates_for(class_id), []).append(class_id)
    return [{"templates": list(templates), "classes": classes} for templates, classes in groups.items()]
