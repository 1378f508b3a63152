"""Translate mergekit's recipes to options of ``clmerge merge``, for the rules that both have.

The rules and their settings are those of mergekit 0.1.5. Settings that clmerge cannot reproduce are refused by name.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any

from clmerge.checkpoints.formats import open_checkpoint
from clmerge.checkpoints.mergekit_rules import METHODS
from clmerge.merging.finish.layers import BLOCK

_RECIPE = {"merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype"}

Setting = Any  # a number, flag or word, a gradient (a list of these), or a list of {filter, value}


@dataclass
class _Input:
    """A model of a recipe and its settings: from the model, the slice and the whole recipe."""

    path: str
    settings: list[Mapping[str, Setting]] = field(default_factory=list)


def is_mergekit(recipe: object) -> bool:
    """Return whether a recipe is mergekit's."""
    return isinstance(recipe, Mapping) and "merge_method" in recipe


def from_mergekit(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of ``clmerge merge`` that are equivalent to a recipe of mergekit.

    Args:
        recipe: The content of its YAML file.

    Returns:
        Plain values by option name: ``base``, ``models``, ``merger``, ``groups``, ``origin``, ``dtype``.

    Raises:
        FileNotFoundError: If the base does not exist.
        ValueError: If the recipe needs a rule or option that clmerge lacks.
    """
    _only(recipe, _RECIPE, "the recipe")
    name = recipe["merge_method"]
    if name not in METHODS:
        raise ValueError(f"expected a merge_method of {', '.join(METHODS)}, got {name!r}, which is not read")
    method = METHODS[name]
    inputs, base, shared = _inputs(recipe)
    base_path = base or inputs[0].path
    tensors = {
        name: entry for name, entry in open_checkpoint(base_path).entries.items() if entry.dtype.is_floating_point
    }
    if "slices" in recipe:
        _check_range(recipe["slices"][0]["sources"], tensors)
    if method.merges_base and base is not None and all(one.path != base for one in inputs):
        inputs.append(_Input(base, [{}, *shared]))
    models = [one for one in inputs if method.merges_base or one.path != base]
    method.check(base, [one.path for one in models])
    if name == "slerp":  # the base is the first of the two models
        models.sort(key=lambda one: one.path != base)
    for one in models:
        _only(one.settings[0], method.by_model, f"the parameters of {one.path}, for {name}")
    for scope in shared:
        _only(scope, method.by_model | method.shared.keys(), f"parameters, for {name}")

    depths = _depths(tensors)
    rules: dict[str, dict[str, Any]] = {}
    chosen: dict[str, str] = {}
    for tensor in tensors:
        at = (tensor, depths.get(tensor, 0.0))
        whole = {key: _resolved(key, shared, default, *at) for key, default in method.shared.items()}
        each = [
            {key: _resolved(key, one.settings, default, *at) for key, default in method.defaults.items()}
            for one in models
        ]
        rule = method.build(whole, each)
        chosen[tensor] = repr(rule)
        rules[chosen[tensor]] = rule
    [(most, _)] = Counter(chosen.values()).most_common(1)
    groups = [
        {"match": [escape(tensor) for tensor, rule in chosen.items() if rule == one], "merger": rules[one]}
        for one in rules
        if one != most
    ]
    dtype = recipe.get("out_dtype") or recipe.get("dtype")
    return {
        "base": base_path,
        "models": [_adapter_of(one.path, base) for one in models],
        "merger": rules[most],
        "groups": groups,
        "origin": "zero" if method.merges_base else "base",
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
    }


def _inputs(recipe: Mapping[str, Any]) -> tuple[list[_Input], str | None, list[Mapping[str, Setting]]]:
    """Return the models, the base, and the settings of the slice and of the whole recipe."""
    shared: list[Mapping[str, Setting]] = [recipe.get("parameters") or {}]
    sources, base = recipe.get("models"), recipe.get("base_model")
    if "slices" in recipe:
        if len(recipe["slices"]) != 1 or sources:
            raise ValueError(f"expected models, or one slice with all layers, got {len(recipe['slices'])} slices")
        [only] = recipe["slices"]
        _only(only, {"sources", "base_model", "parameters"}, "the slice")
        shared.insert(0, only.get("parameters") or {})
        sources, base = only["sources"], only.get("base_model", base)
    if not sources:
        raise ValueError("expected models in the recipe, got none")
    inputs = []
    for source in sources:
        _only(
            source, {"model", "parameters", "layer_range"} if "slices" in recipe else {"model", "parameters"}, "a model"
        )
        inputs.append(_Input(_path(source["model"]), [source.get("parameters") or {}, *shared]))
    return inputs, None if base is None else _path(base), shared


def _path(model: Any) -> str:
    if not isinstance(model, str):
        raise ValueError(f"expected a model as a path, got {model!r}")
    return model


def _adapter_of(path: str, base: str | None) -> str:
    """Return the adapter's path in ``BASE+ADAPTER``; the adapter is a task vector of the base."""
    model, plus, adapter = path.partition("+")
    if not plus or Path(path).exists():
        return path
    if base is None or model != base:
        raise ValueError(f"expected an adapter to the base model {base}, got {path!r}; merge it into {model} first")
    return adapter


def _only(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    if unknown := [key for key in given if key not in set(known) | {"int8_mask"}]:
        raise ValueError(
            f"expected only {', '.join(sorted(known)) or 'no settings'} in {where}, got {unknown[0]!r}, which is not "
            "read; take it out"
        )


def _check_range(sources: Sequence[Mapping[str, Any]], tensors: Iterable[str]) -> None:
    """Refuse slices that do not cover the whole model."""
    layers = 1 + max((int(match[1]) for name in tensors if (match := re.search(BLOCK, name))), default=-1)
    for source in sources:
        if list(source.get("layer_range") or [0, layers]) != [0, layers]:
            raise ValueError(f"expected all layers, [0, {layers}], got the slice {source['layer_range']} of a model")


def _depths(names: Iterable[str]) -> dict[str, float]:
    """Return, for tensors in blocks, the relative depth in their tower: 0 in the first block, 1 in the last."""
    found = {name: (name[: match.start()], int(match[1])) for name in names if (match := re.search(BLOCK, name))}
    last: dict[str, int] = {}
    for tower, index in found.values():
        last[tower] = max(last.get(tower, 0), index)
    return {name: index / last[tower] if last[tower] else 1.0 for name, (tower, index) in found.items()}


def _resolved(setting: str, scopes: Iterable[Mapping[str, Setting]], default: Any, tensor: str, depth: float) -> Any:
    for scope in scopes:
        if setting in scope and (value := _evaluated(scope[setting], tensor, depth)) is not None:
            return value
    if default is None:
        raise ValueError(f"expected {setting} for {tensor!r}, got none; add it to the parameters")
    return default


def _evaluated(setting: Setting, tensor: str, depth: float) -> Any:
    """Return a setting's value for one tensor: of the first filter in its name; for a gradient, at its depth."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return _scalar(setting)
    if not all(isinstance(item, Mapping) for item in setting):
        values = [_scalar(item) for item in setting]
        position = depth * (len(values) - 1)
        low = int(position)
        if any(isinstance(value, bool | str) for value in values):
            return values[low]
        high, share = min(len(values) - 1, low + 1), position - low
        return (1 - share) * values[low] + share * values[high]
    for item in setting:
        _only(item, {"filter", "value"}, "a filter")
        if item.get("filter") in (None, "*") or item["filter"] in tensor:
            return _evaluated(item["value"], tensor, depth)
    return None


def _scalar(value: Any) -> Any:
    """Convert numbers that YAML 1.1 parses as text, such as 1e-5."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
