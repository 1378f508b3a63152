"""Checks of the statistics of a task vector that run before the merger's state changes."""

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

from clmerge.merging.at_once import concatenated, device_packs, largest_magnitudes
from clmerge.merging.gathered import gathered
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State


def diagonal_of(step: Step, vector: State, statistic: str) -> dict[str, Tensor]:
    """Return a statistic with one non-negative number for every entry of the task vector.

    Args:
        step: The update of the task vector.
        vector: The task vector.
        statistic: Name of the statistic.

    Returns:
        The given statistic of every parameter of ``vector``.

    Raises:
        ValueError: If a parameter is missing or of another shape, or an entry is negative, NaN or Inf.
        TypeError: If the statistic is not a mapping of names to tensors.
    """
    given = tensors_of(step, statistic)
    for name in vector:
        if name not in given:
            raise ValueError(
                f"expected {statistic!r} for every parameter of task {step.task}, got none for {name!r}; "
                "collect it for the parameters that are merged"
            )
        if given[name].shape != vector[name].shape:
            raise ValueError(
                f"expected {statistic!r} of shape {tuple(vector[name].shape)} for {name!r} of task {step.task}, "
                f"got {tuple(given[name].shape)}"
            )
    found = {name: given[name] for name in vector}
    if _has_negative(found):
        name = next(name for name in found if _has_negative({name: found[name]}))
        raise ValueError(
            f"expected {statistic!r} without negative entries, got {float(found[name].min())} for {name!r} of task "
            f"{step.task}; it is a mean of squares"
        )
    return found


def _has_negative(tensors: State) -> bool:
    """Return whether finite tensors have a negative entry, with one question to the device."""
    held = {name: tensors[name].detach() for name in tensors if tensors[name].numel()}
    packs = device_packs(held)
    least = [concatenated([held[name] for name in pack.names]).amin().reshape(1) for pack in packs]
    return bool((gathered(least) < 0).any())


def base_weights(step: Step, vector: State, names: Iterable[str]) -> State:
    """Return the base model's weights that were given beside a task vector.

    Args:
        step: The update of the task vector; the rule requires the statistic ``"weights"``.
        vector: The task vector.
        names: Parameters that must be among them, of the vector's shapes.

    Raises:
        TypeError: If the statistic is not a mapping of names to tensors.
        ValueError: If a parameter is missing or of another shape.
    """
    weights = tensors_of(step, "weights")
    for name in names:
        shape = tuple(vector[name].shape)
        if name not in weights or tuple(weights[name].shape) != shape:
            found = tuple(weights[name].shape) if name in weights else "none"
            raise ValueError(
                f"expected the base model's {name!r} of shape {shape} among the weights beside task {step.task}, got "
                f'{found}; pass statistics={{"weights": theta0}}'
            )
    return weights


def tensors_of(step: Step, statistic: str) -> State:
    """Return a statistic that holds finite floating-point tensors by parameter name.

    Args:
        step: The update of the task vector.
        statistic: Name of the statistic; the rule requires it.

    Raises:
        TypeError: If the statistic is not a mapping of names to tensors.
        ValueError: If a tensor is not floating-point, or holds NaN or Inf.
    """
    given = step.statistics[statistic]
    if not isinstance(given, Mapping):
        raise TypeError(f"expected {statistic!r} as parameter name -> tensor, got {type(given).__name__}")
    wrong = [name for name in given if not given[name].is_floating_point()]
    if not wrong:
        magnitudes = largest_magnitudes([*given.values()])
        wrong = [name for name, largest in zip(given, magnitudes, strict=True) if not math.isfinite(largest)]
    if wrong:
        raise ValueError(
            f"expected finite floating-point numbers in {statistic!r} of task {step.task}, got NaN, Inf or "
            f"{given[wrong[0]].dtype} for {wrong[0]!r}; the state is unchanged"
        )
    return given


def number_of(step: Step, statistic: str) -> float:
    """Return a statistic that is one finite number.

    Args:
        step: The update of the task vector.
        statistic: Name of the statistic, such as ``"loss"``.

    Raises:
        TypeError: If the statistic holds tensors by name.
        ValueError: If it is NaN or Inf.
    """
    given = step.statistics[statistic]
    if isinstance(given, Mapping):
        raise TypeError(f"expected one number as {statistic!r} of task {step.task}, got tensors by name")
    if not math.isfinite(given):
        raise ValueError(f"expected a finite number as {statistic!r} of task {step.task}, got {given}")
    return float(given)


def positive_number_of(step: Step, statistic: str) -> float:
    """Return a statistic that is one positive number.

    Args:
        step: The update of the task vector.
        statistic: Name of the statistic, such as ``"samples"``.

    Raises:
        TypeError: If the statistic holds tensors by name.
        ValueError: If it is NaN, Inf, zero or negative.
    """
    number = number_of(step, statistic)
    if number <= 0:
        raise ValueError(f"expected a positive number as {statistic!r} of task {step.task}, got {number}")
    return number
