"""mergekit's merge methods as rules of ``clmerge.merging``, with the options that make the results agree."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Plain = dict[str, Any]
"""A class and its settings, as in a recipe."""

_DIGITS = 12  # decimal digits kept, so that 1 - 0.9 is 0.1


@dataclass(frozen=True)
class Method:
    """One of mergekit's methods.

    Attributes:
        build: Builds the rule from the settings of the whole merge and those of every model.
        shared: Settings of the whole merge and their defaults.
        defaults: Settings of every model and their defaults; None marks a required setting.
        merges_base: Whether weights, including the base's, are merged instead of task vectors.
        num_models: Allowed numbers of models beside the base of task vectors.
        needs_base: Whether a base is required.
    """

    build: Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], Plain]
    shared: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    merges_base: bool = False
    num_models: range = range(1, 1 << 30)
    needs_base: bool = True

    @property
    def by_model(self) -> set[str]:
        """The allowed settings of a model."""
        return set(self.defaults)

    def check(self, base: str | None, models: Sequence[str]) -> None:
        """Raise a ValueError if the base is missing or there are too few or too many models."""
        if self.needs_base and base is None:
            raise ValueError("expected a base_model, got none; add it to the recipe")
        if len(models) not in self.num_models:
            wanted = f"{self.num_models.start}{'' if len(self.num_models) == 1 else ' or more'}"
            raise ValueError(f"expected {wanted} models, got {len(models)}: {', '.join(models)}")
        if self.merges_base and self.needs_base and base not in models:
            raise ValueError(f"expected the base model {base} among the models, got {', '.join(models)}")


def _made(name: str, **settings: Any) -> Plain:
    return {"class_path": name, "init_args": settings}


def _linear(whole: Mapping[str, Any], each: Sequence[Mapping[str, Any]]) -> Plain:
    if whole["normalize"] and not sum(one["weight"] for one in each):
        raise ValueError("expected weights that do not add up to 0, got such; set normalize to false or change them")
    return _sum({"lambda": 1.0} | dict(whole), each)


def _sum(whole: Mapping[str, Any], each: Sequence[Mapping[str, Any]]) -> Plain:
    weights = [float(one["weight"]) for one in each]
    total = sum(weights) if whole["normalize"] else 1.0
    return _made("TaskArithmetic", scale=whole["lambda"] / (total if abs(total) >= 1e-8 else 1.0), weights=weights)


def _elect(whole: Mapping[str, Any], each: Sequence[Mapping[str, Any]], density: float = 1.0) -> Plain:
    weights = [float(one["weight"]) for one in each]
    merge = "mean" if whole["normalize"] else "sum"
    equal = len(set(weights)) == 1 and weights[0] > 0
    scale = whole["lambda"] * (weights[0] if equal and merge == "sum" else 1.0)
    chosen = {} if equal else {"weights": weights}
    return _made("TIES", density=density, trim="tensor", merge=merge, scale=scale, **chosen)


def _ties(whole: Mapping[str, Any], each: Sequence[Mapping[str, Any]]) -> Plain:
    densities = [float(one["density"]) for one in each]
    if len(set(densities)) == 1:
        return _elect(whole, each, min(densities[0], 1.0))
    return _before(_elect(whole, each), [_made("TrimTensor", density=min(density, 1.0)) for density in densities])


def _before(reducer: Plain, sparsifiers: list[Plain]) -> Plain:
    same = all(one == sparsifiers[0] for one in sparsifiers)
    sparsifier = sparsifiers[0] if same else _made("ByTask", parts=sparsifiers)
    return _made("Pipeline", reducer=reducer, sparsifier=sparsifier)


def _sparse(
    reduce: Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], Plain],
    sparsifier: Callable[[Mapping[str, Any], Mapping[str, Any]], Plain],
) -> Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], Plain]:
    return lambda whole, each: _before(reduce(whole, each), [sparsifier(whole, one) for one in each])


def _drop_rate(one: Mapping[str, Any]) -> float:
    return max(0.0, round(1 - float(one["density"]), _DIGITS))


def _rescale(whole: Mapping[str, Any]) -> str:
    return "l1" if whole["rescale"] else "none"


def _random(whole: Mapping[str, Any], one: Mapping[str, Any]) -> Plain:
    return _made("RandomDrop", drop_rate=_drop_rate(one), rescale=_rescale(whole))


def _by_magnitude(whole: Mapping[str, Any], one: Mapping[str, Any]) -> Plain:
    window = 2 * one["epsilon"] if one["density"] < 1 else 0.0
    return _made("MagnitudeDrop", drop_rate=_drop_rate(one), window=window, rescale=_rescale(whole))


def _middle(whole: Mapping[str, Any], one: Mapping[str, Any]) -> Plain:
    dropped = _drop_rate(one)
    gamma = min(one["gamma"], dropped)
    return _made("BreadcrumbsMask", beta=round(dropped - gamma, _DIGITS), gamma=gamma)


def _nuslerp(whole: Mapping[str, Any], each: Sequence[Mapping[str, Any]]) -> Plain:
    first, second = (float(one["weight"]) for one in each)
    return _made("SLERP", t=second / (first + second) if abs(first + second) >= 1e-6 else 0.5)


_WEIGHT = {"weight": None}
_DENSITY = {"weight": None, "density": 1.0}
_CRUMBS = _DENSITY | {"gamma": 0.01}
_DELLA = _DENSITY | {"epsilon": 0.15}
_PLAIN_SUM = {"normalize": False, "lambda": 1.0}
_MEAN = {"normalize": True, "lambda": 1.0}
_RESCALED = _PLAIN_SUM | {"rescale": True}

METHODS: dict[str, Method] = {
    "linear": Method(_linear, {"normalize": True}, _WEIGHT, merges_base=True, needs_base=False),
    "slerp": Method(
        lambda whole, each: _made("SLERP", t=whole["t"]), {"t": None}, merges_base=True, num_models=range(2, 3)
    ),
    "nuslerp": Method(_nuslerp, {}, _WEIGHT, num_models=range(2, 3)),
    "task_arithmetic": Method(_sum, _PLAIN_SUM, _WEIGHT),
    "ties": Method(_ties, _MEAN, _DENSITY),
    "dare_linear": Method(_sparse(_sum, _random), _RESCALED, _DENSITY),
    "dare_ties": Method(_sparse(_elect, _random), _RESCALED, _DENSITY),
    "breadcrumbs": Method(_sparse(_sum, _middle), _PLAIN_SUM, _CRUMBS),
    "breadcrumbs_ties": Method(_sparse(_elect, _middle), _PLAIN_SUM, _CRUMBS),
    "della_linear": Method(_sparse(_sum, _by_magnitude), _RESCALED, _DELLA),
    "della": Method(_sparse(_elect, _by_magnitude), _MEAN | {"rescale": True}, _DELLA),
    "model_stock": Method(lambda whole, each: _made("ModelStock"), num_models=range(2, 1 << 30)),
}
"""The supported methods, by merge_method."""
