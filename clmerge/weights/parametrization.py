"""Modules that train other tensors than their dense weights, and how both are read and written by dense names."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from clmerge.weights.factored import Product
from clmerge.weights.selection import COMPILE_PREFIX, choose
from clmerge.weights.swap import check_present, full_copy, own_tensors
from clmerge.weights.task_vector import State, TaskVector, apply_task_vector, task_vector


class Parametrized(nn.Module, ABC):
    """A module whose dense weights are not, by themselves, what is trained (LoRA, tangent models, ...).

    The *dense names* are those the weights had before the module was tuned this way, relative to this module. They,
    not the tensors that are trained, are what a task vector is made of: every merger sees dense tensors.
    """

    answers_for_children: ClassVar[bool] = True
    """Whether parametrized modules inside of this one are its own matter: they are not asked themselves then."""

    shardable: ClassVar[bool] = True
    """Whether FSDP2 may shard it: it takes parameters for what ``getattr`` gives under their names."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Return the dense names of the weights that the inner parameters move."""

    @abstractmethod
    def inner(self) -> Sequence[str]:
        """Return names of this module's own parameters that are never merged by themselves: factors, scales."""

    @abstractmethod
    def dense(self) -> dict[str, Tensor]:
        """Return the weights that the module computes with now, by the dense names of ``names``; differentiable."""

    @abstractmethod
    def state(self, base: State, tau: State) -> dict[str, Tensor]:
        """Return values of own parameters with which the module computes ``base + tau`` in its mode.

        Args:
            base: Dense weights by dense names; all of ``names`` or some.
            tau: What is added to them; the same names.

        Returns:
            Value by own name, in the base's dtype; differentiable by ``tau``. Parameters that are not named keep their
            values.
        """

    @abstractmethod
    def renew(self, generator: torch.Generator) -> None:
        """Start a task: keep what is computed, in place, with fresh inner parameters drawn from ``generator``."""

    @abstractmethod
    def folded(self) -> nn.Module:
        """Return an ordinary module with the dense weights under their dense names; it may share the others."""

    def delta(self, base: State) -> TaskVector:
        """Return ``dense - base``, detached, in float32 (float64 if either side is).

        Args:
            base: Dense weights of the base model by dense names; all of ``names`` or some.
        """
        with torch.no_grad():
            dense = self.dense()
        return task_vector({name: full_copy(dense[name]) for name in base}, base)

    def low_rank(self, base: State) -> dict[str, Product]:
        """Return factors of those entries of ``delta`` whose rank is known to be low; none by default."""
        return {}

    def dense_name(self, own: str) -> str:
        """Return the dense name of an own parameter or buffer that is not inner; the same by default."""
        return own


def parametrized(module: nn.Module) -> dict[str, Parametrized]:
    """Return the parametrized submodules to ask, from the outside in, by prefix (``"a.b."``, or ``""``)."""
    return {f"{path}.".replace(COMPILE_PREFIX, "") if path else "": part for path, part in _to_ask(module).items()}


def own_names(module: nn.Module) -> dict[str, str]:
    """Return dense name -> own name of all parameters and buffers but the inner ones."""
    return _own_names(parametrized(module), own_tensors(module))


def dense_weights(module: nn.Module, names: Iterable[str], *, origin: str = "the task vector") -> dict[str, Tensor]:
    """Return the weights that a module computes with now, by dense names; differentiable.

    Args:
        module: Any module; ordinary parameters and buffers are returned themselves.
        names: Dense names.
        origin: Where the names come from, for the error message.

    Raises:
        RuntimeError: If the module lacks one of them.
    """
    names = list(names)
    layout = _Layout(module, names, origin=origin)
    weights = dict(layout.plain)
    for prefix, part, _ in layout.parts:
        weights |= {prefix + name: tensor for name, tensor in part.dense().items()}
    return {name: weights[name] for name in names}


def merged_parameters(
    module: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Select what is merged: ordinary trained parameters, and dense weights that inner parameters move.

    Args:
        module: The module, tuned in any mode, compiled or not.
        include: Glob patterns over dense names, as for ``select_parameters``; default all that is trained.
        exclude: Glob patterns of what is left out.

    Returns:
        Dense weights by name, in the module's order; ordinary parameters themselves, others differentiable.

    Raises:
        ValueError: As ``select_parameters`` does.
    """
    parts = parametrized(module)
    aliases: dict[nn.Parameter, list[str]] = {}
    moved = set[str]()
    inner = {prefix + name for prefix, part in parts.items() for name in part.inner()}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    parameters = {name.replace(COMPILE_PREFIX, ""): parameter for name, parameter in parameters.items()}
    for prefix, part in parts.items():
        if any(parameters[prefix + name].requires_grad for name in part.inner()):
            moved |= {prefix + name for name in part.names()}
    for name, parameter in parameters.items():
        if name not in inner:
            aliases.setdefault(parameter, []).append(_dense_name(parts, name))
    groups = {
        group[0]: (
            group,
            parameter.is_floating_point() and (parameter.requires_grad or not moved.isdisjoint(group)),
        )
        for parameter, group in aliases.items()
    }
    return dense_weights(module, choose(groups, include, exclude, owner=type(module).__name__))


def read_task_vector(
    module: nn.Module, base: State, *, device: torch.device | None = None, origin: str = "the base model"
) -> TaskVector:
    """Return what training added to the base: ``theta - theta_0`` by dense names, whole tensors.

    Args:
        module: The trained module.
        base: theta_0 by dense names.
        device: Where the vector shall be; default where the module's tensors are.
        origin: Where the base comes from, for the error message.

    Raises:
        RuntimeError: If the module lacks a parameter of the base.
        ValueError: If a shape differs.
    """
    layout = _Layout(module, base, origin=origin)
    theta = {name: full_copy(tensor, device) for name, tensor in layout.plain.items()}
    vector = task_vector(theta, {name: base[name] for name in theta})
    for prefix, part, local in layout.parts:
        for name, tensor in part.delta({name: base[prefix + name] for name in local}).items():
            vector[prefix + name] = tensor.to(device or tensor.device)
    return {name: vector[name] for name in base}


def read_factors(module: nn.Module, base: State, *, origin: str = "the base model") -> dict[str, Product]:
    """Return thin factors of what training added to the base, for the dense weights of which they are known.

    Args:
        module: The trained module.
        base: theta_0 by dense names.
        origin: Where the base comes from, for the error message.
    """
    found: dict[str, Product] = {}
    for prefix, part, local in _Layout(module, base, origin=origin).parts:
        factors = part.low_rank({name: base[prefix + name] for name in local})
        found |= {prefix + name: factor for name, factor in factors.items()}
    return found


def state_of(
    module: nn.Module, base: State, tau: State, *, buffers: State | None = None, origin: str = "the base model"
) -> dict[str, Tensor]:
    """Return values with which a module computes ``base + tau`` in its own mode, by the module's own names.

    Args:
        module: The module that the values are for; it is not changed.
        base: theta_0 by dense names.
        tau: What is added, by dense names; names that are missing keep the base's weights.
        buffers: Other tensors by dense names, taken as they are.
        origin: Where the base comes from, for the error message.

    Returns:
        Values to swap in, to assign, or for ``functional_call``; without ``torch.compile``'s ``_orig_mod.``.
        Differentiable by ``tau``.

    Raises:
        RuntimeError: If the module lacks one of the names.
        ValueError: If ``tau`` has a name that ``base`` does not have, or a shape differs.
    """
    layout = _Layout(module, [*base, *(buffers or {})], origin=origin)
    in_parts = {prefix + name for prefix, _, local in layout.parts for name in local}
    plain = apply_task_vector(
        {name: tensor for name, tensor in base.items() if name not in in_parts},
        {name: tensor for name, tensor in tau.items() if name not in in_parts},
    )
    values = {layout.own[name]: tensor for name, tensor in {**plain, **(buffers or {})}.items()}
    for prefix, part, local in layout.parts:
        start = {name: base[prefix + name] for name in local}
        moved = {name: tau.get(prefix + name, torch.zeros_like(start[name])) for name in local}
        values |= {prefix + name: tensor for name, tensor in part.state(start, moved).items()}
    return values


def running_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Return copies on the CPU of a module's running statistics (BatchNorm's means and variances) by dense name."""
    buffers = {name.replace(COMPILE_PREFIX, "") for name, _ in module.named_buffers()}
    tensors = own_tensors(module)
    return {
        name: full_copy(tensors[own], torch.device("cpu"))
        for name, own in own_names(module).items()
        if own in buffers and tensors[own].is_floating_point() and own.rsplit(".", 1)[-1].startswith("running_")
    }


def renew(module: nn.Module, *, seed: int, task: int) -> None:
    """Start a task: every parametrized submodule keeps what it computes and draws fresh inner parameters.

    Args:
        module: The module; changed in place.
        seed: Seed of the run.
        task: Index of the task. The numbers depend on seed, task and the submodule's name alone.
    """
    for prefix, part in parametrized(module).items():
        digest = hashlib.sha256(f"renew/{seed}/{task}/{prefix}".encode()).digest()
        part.renew(torch.Generator().manual_seed(int.from_bytes(digest[:8], "big")))


@contextmanager
def folded(module: nn.Module) -> Iterator[nn.Module]:
    """Run a block with ordinary modules in place of the parametrized ones, whose dense weights they have.

    Names are dense names inside of the block, as in the module before it was tuned this way.

    Args:
        module: The module; its parametrized submodules come back in any case.

    Yields:
        The folded module: ``module`` itself with submodules exchanged, or a new one if it is parametrized as a whole.
    """
    parts = dict(reversed(_to_ask(module).items()))  # from the inside out: a folded part may hold folded ones
    whole = parts.pop("", None)
    try:
        for path, part in parts.items():
            module.set_submodule(path, part.folded())
        yield module if whole is None else whole.folded()
    finally:
        for path, part in reversed(parts.items()):
            module.set_submodule(path, part)


class _Layout:
    """Where dense names are in a module: ordinary tensors, and names relative to every parametrized submodule."""

    def __init__(self, module: nn.Module, names: Iterable[str], *, origin: str) -> None:
        names = list(names)
        tensors = own_tensors(module)
        found = parametrized(module)
        self.own = _own_names(found, tensors)
        self.parts: list[tuple[str, Parametrized, list[str]]] = []
        wanted = dict.fromkeys(names)
        inside = set[str]()
        for prefix, part in found.items():
            moved = [name for name in part.names() if prefix + name in wanted]
            inside |= {prefix + name for name in moved}
            if moved:
                self.parts.append((prefix, part, moved))
        check_present(module, {*self.own, *inside}, names, origin=origin)
        self.plain = {name: tensors[self.own[name]] for name in names if name not in inside}


def _own_names(parts: dict[str, Parametrized], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    inner = {prefix + name for prefix, part in parts.items() for name in part.inner()}
    return {_dense_name(parts, name): name for name in tensors if name not in inner}


def _dense_name(parts: dict[str, Parametrized], own: str) -> str:
    for prefix, part in reversed(parts.items()):
        if own.startswith(prefix):
            return prefix + part.dense_name(own.removeprefix(prefix))
    return own


def _to_ask(module: nn.Module) -> dict[str, Parametrized]:
    found: dict[str, Parametrized] = {}
    closed: list[str] = []
    for path, part in module.named_modules():
        if isinstance(part, Parametrized) and not any(path.startswith(prefix) for prefix in closed):
            found[path] = part
            if part.answers_for_children:
                closed.append(f"{path}." if path else "")
    return found
