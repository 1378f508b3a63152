"""Checks of a task vector that run before the merger's state changes."""

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from math import prod
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from clmerge.merging.gathered import gathered
from clmerge.weights.task_vector import State

Shapes = dict[str, tuple[int, ...]]
Choice = TypeVar("Choice")
Entry = TypeVar("Entry")

MOST_STEPS = 100_000  # of solvers; published settings are 100 to 1,000


def num_entries(shapes: Shapes) -> int:
    """Return the total number of entries of all parameters.

    Example:
        >>> num_entries({"w": (2, 3), "scale": ()})
        7
    """
    return sum(prod(shape) for shape in shapes.values())


def read_shapes(vector: State) -> Shapes:
    """Return the shapes of a task vector by name.

    Args:
        vector: The argument of ``update``.

    Raises:
        TypeError: If it is not a mapping of names to tensors.
        ValueError: If it is empty or a tensor is not real floating-point.
    """
    if not isinstance(vector, Mapping):
        raise TypeError(f"expected a task vector (parameter name -> tensor), got {type(vector).__name__}")
    if not vector:
        raise ValueError("expected a task vector with at least one parameter, got an empty one; check what is selected")
    shapes = {}
    for name in vector:
        tensor = vector[name]
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(
                f"expected a task vector (parameter name -> tensor), got {type(tensor).__name__} under {name!r}"
            )
        if not tensor.is_floating_point():
            raise ValueError(
                f"expected floating-point tensors in the task vector, got {tensor.dtype} for {name!r}; "
                "leave integer, bool and complex parameters out of the merge"
            )
        shapes[name] = tuple(tensor.shape)
    return shapes


def check_shapes(shapes: Shapes, known: Shapes, source: str) -> None:
    """Raise a ValueError if names or shapes differ from those of the vectors merged so far.

    Args:
        shapes: Shapes of the new vector.
        known: Shapes of the vectors merged so far.
        source: Name of the new vector in the message.
    """
    missing = [name for name in known if name not in shapes]
    unknown = [name for name in shapes if name not in known]
    if missing or unknown:
        hints = []
        for name in unknown[:3]:
            close = get_close_matches(name, missing, n=1)
            hints.append(repr(name) + (f" (nearest: {close[0]!r})" if close else ""))
        found = [f"{len(missing)} missing: {', '.join(map(repr, missing[:3]))}"] if missing else []
        found += [f"{len(unknown)} unknown: {', '.join(hints)}"] if unknown else []
        raise ValueError(
            f"expected the parameters of the task vectors merged so far, got {source} with "
            f"{'; '.join(found)}; select the same parameters for every task"
        )
    for name, shape in shapes.items():
        if shape != known[name]:
            raise ValueError(
                f"expected shape {known[name]} for {name!r} as in the task vectors merged so far, "
                f"got {shape} in {source}"
            )


def check_base(base: str | None, known: str | None, source: str) -> None:
    """Raise a ValueError if a task vector belongs to another base model.

    Args:
        base: Fingerprint of the new vector's base model; None if unknown.
        known: Fingerprint of the base model of the vectors merged so far; None if unknown.
        source: Name of the new vector in the message.
    """
    if base is not None and known is not None and base != known:
        raise ValueError(
            f"expected the base model {known[:12]}... of the vectors merged so far, got {source} of base "
            f"model {base[:12]}...; task vectors of different base models cannot be merged"
        )


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor is free of NaN and Inf.

    Args:
        tensor: Any shape, floating-point.

    Example:
        >>> is_finite(torch.tensor([3e38, 3e38])), is_finite(torch.tensor([3e38, float("inf")]))
        (True, False)
    """
    # One read-only pass: a sum is not finite if any entry is not. A sum of finite entries may also overflow, hence the
    # second check.
    return math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all())


def not_finite(vector: State) -> list[str]:
    """Return the names of the parameters with NaN or Inf; what lies on a GPU is asked once for all of them.

    Args:
        vector: Tensors by name.

    Example:
        >>> not_finite({"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])})
        ['b']
    """
    sums = gathered([vector[name].detach().sum().reshape(1) for name in vector]).tolist()
    return [n for n, total in zip(vector, sums, strict=True) if not math.isfinite(total) and not is_finite(vector[n])]


def check_finite(vector: State) -> None:
    """Raise a ValueError that names the first parameter with NaN or Inf.

    Args:
        vector: The task vector to check.
    """
    for name in not_finite(vector)[:1]:
        tensor = vector[name].detach()
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        raise ValueError(
            f"expected finite values, got {bad} NaN or Inf among the {tensor.numel()} entries of {name!r}; "
            "the state is unchanged: look for a diverged training run"
        )


def checked_share(name: str, value: float) -> float:
    """Return a setting that is a share; raise a ValueError if it is not in [0, 1].

    Args:
        name: Name of the setting.
        value: The share.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"expected {name} in [0, 1], got {value}")
    return value


def checked_choice(name: str, value: Choice, allowed: Any) -> Choice:
    """Return a setting that has one of a few values; raise a ValueError if it has another.

    Args:
        name: Name of the setting.
        value: Its value.
        allowed: The ``Literal`` of the values.

    Example:
        >>> from typing import Literal
        >>> checked_choice("solver", "sgd", Literal["adam", "ridge"])
        Traceback (most recent call last):
        ValueError: expected solver 'adam' or 'ridge', got 'sgd'
    """
    if value not in get_args(allowed):
        *others, last = map(repr, get_args(allowed))
        raise ValueError(f"expected {name} {', '.join(others)} or {last}, got {value!r}")
    return value


def of_task(name: str, entries: Sequence[Entry], task: int) -> Entry:
    """Return a task's entry of a setting that has one for every task.

    Args:
        name: Name of the setting.
        entries: Its entries, by task index.
        task: Index of the task.

    Raises:
        ValueError: If there is none for the task.
    """
    if not 0 <= task < len(entries):
        raise ValueError(f"expected an entry of {name} for task {task}, got {len(entries)} entries; give one per task")
    return entries[task]


def checked_steps(steps: int, least: int = 1, *, name: str = "steps") -> int:
    """Return the number of steps of a solver.

    Raises:
        ValueError: If it is smaller than ``least``, or so large (above 100,000) that a merge would seem to hang.
    """
    if not least <= steps <= MOST_STEPS:
        raise ValueError(f"expected {name} from {least} to {MOST_STEPS:,}, got {steps}")
    return steps
