"""Task vectors: the weight change of fine-tuning relative to the base model, one tensor per parameter name."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]
TaskVector = dict[str, Tensor]

_NAMES_SHOWN = 3


class CheckedVector(dict[str, Tensor]):
    """A task vector known to be finite, so that several mergers need not check or hash it again.

    Attributes:
        examined: Cached result of ``clmerge.merging.identity.examine``.
        stored: A reference to where the vector lies, or will lie before it is next read. Rules that keep every vector
            keep it in place of a copy.
    """

    examined: Any = None
    stored: "LazyVector | None" = None

    @cached_property
    def sha256(self) -> str:
        """The fingerprint."""
        return _sha256(self)


class LazyVector(Mapping[str, Tensor], ABC):
    """A task vector whose tensors are read on access; rules may keep it instead of a copy."""

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Return the names of the parameters."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(list(self.names()))


def task_vector(
    theta: State, base: State, *, sources: tuple[str, str] = ("the fine-tuned model", "the base model")
) -> TaskVector:
    """Compute ``theta - base`` for every parameter (Ilharco et al., arXiv 2212.04089).

    The difference is taken in float32 (float64 if either side is float64), so half-precision weights are
    widened before they are subtracted.

    Args:
        theta: Fine-tuned weights by name, any floating dtype, any shape.
        base: Weights of the base model by the same names and shapes.
        sources: Names of the two states in error messages, for example file names.

    Returns:
        One new tensor per name on ``theta``'s device; no memory is shared with the inputs.

    Raises:
        ValueError: If names or shapes differ, or a tensor is not floating-point.

    Example:
        >>> task_vector({"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([1.0, 1.0])})
        {'w': tensor([0., 2.])}
    """
    check_same_names(theta, base, sources)
    vector = {}
    for name, fine_tuned in theta.items():
        start = base[name]
        check_same_shape(name, fine_tuned, start, sources)
        _check_floating(name, fine_tuned, sources[0])
        _check_floating(name, start, sources[1])
        dtype = accumulator_dtype(fine_tuned, start)
        fine_tuned, start = fine_tuned.detach(), start.detach().to(fine_tuned.device)
        vector[name] = fine_tuned.to(dtype) - start.to(dtype)
    return vector


def apply_task_vector(
    base: State, tau: State, *, sources: tuple[str, str] = ("the base model", "the task vector")
) -> TaskVector:
    """Add a task vector to the base model: ``base + tau``.

    The sum is taken in float32 (float64 if either side is float64) and cast to the base's dtype.

    Args:
        base: Weights of the base model by name.
        tau: The vector to add, by name; weights of ``base`` that it lacks are unchanged.
        sources: Names of the two in error messages.

    Returns:
        One new tensor for every name of ``base``, in its dtype and on its device; differentiable by ``tau``.

    Raises:
        ValueError: If ``tau`` has a name or a shape that ``base`` does not have.

    Example:
        >>> apply_task_vector({"w": torch.ones(2), "b": torch.zeros(1)}, {"w": torch.tensor([0.0, 2.0])})
        {'w': tensor([1., 3.]), 'b': tensor([0.])}
    """
    unknown = [name for name in tau if name not in base]
    if unknown:
        raise ValueError(
            f"expected parameters of {sources[0]}, got {_shown(unknown)} in {sources[1]}, which it does not "
            "have; apply a task vector to the base model it was taken from"
        )
    merged = {}
    for name, start in base.items():
        start = start.detach()
        if name not in tau:
            merged[name] = start.clone()
            continue
        check_same_shape(name, tau[name], start, (sources[1], sources[0]))
        dtype = accumulator_dtype(tau[name], start)
        total = start.to(dtype) + tau[name].to(device=start.device, dtype=dtype)
        merged[name] = total.to(start.dtype)
    return merged


def fingerprint(state: State) -> str:
    """Hash names, dtypes, shapes and bytes of a state, to identify a base model for example.

    Args:
        state: Tensors by name, any dtype and device; their order does not matter.

    Returns:
        The SHA-256 as 64 hexadecimal digits.

    Example:
        >>> fingerprint({"w": torch.zeros(2)})[:12]
        '958fa745ba83'
    """
    return state.sha256 if isinstance(state, CheckedVector) else _sha256(state)


def _sha256(state: State) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu").contiguous()
        header = json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        digest.update(header.encode() + b"\n")
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def accumulator_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any of the tensors is float64, else float32.

    Example:
        >>> accumulator_dtype(torch.zeros(1, dtype=torch.bfloat16))
        torch.float32
    """
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def check_same_names(left: State, right: State, sources: tuple[str, str]) -> None:
    """Raise a ValueError if the names differ; the message shows the first names that only one state has."""
    only_left = [name for name in left if name not in right]
    only_right = [name for name in right if name not in left]
    if only_left or only_right:
        found = [
            f"{_shown(names)} only in {source}"
            for names, source in ((only_left, sources[0]), (only_right, sources[1]))
            if names
        ]
        raise ValueError(
            f"expected the same parameters in {sources[0]} and {sources[1]}, got {' and '.join(found)}; "
            "select the same parameters on both sides"
        )


def check_same_shape(name: str, left: Tensor, right: Tensor, sources: tuple[str, str]) -> None:
    """Raise a ValueError if a parameter has another shape in the other state."""
    if left.shape != right.shape:
        raise ValueError(
            f"expected one shape for {name!r}, got {tuple(left.shape)} in {sources[0]} and "
            f"{tuple(right.shape)} in {sources[1]}; leave the parameter out or use models of one architecture"
        )


def _check_floating(name: str, tensor: Tensor, source: str) -> None:
    if not tensor.is_floating_point():
        raise ValueError(
            f"expected floating-point parameters, got {tensor.dtype} for {name!r} in {source}; "
            "leave integer and bool tensors out of the merge"
        )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(repr(name) for name in names[:_NAMES_SHOWN]) + more
