"""Checks of the statistics of a task vector that run before the merger's state changes."""

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

from clmerge.merging.checks import is_finite
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
        if bool((given[name] < 0).any()):
            raise ValueError(
                f"expected {statistic!r} without negative entries, got {float(given[name].min())} for {name!r} of "
                f"task {step.task}; it is a mean of squares"
            )
    return {name: given[name] for name in vector}


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
    for name, tensor in given.items():
        if not tensor.is_floating_point() or not is_finite(tensor.detach()):
            raise ValueError(
                f"expected finite floating-point numbers in {statistic!r} of task {step.task}, got NaN, Inf or "
                f"{tensor.dtype} for {name!r}; the state is unchanged"
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
