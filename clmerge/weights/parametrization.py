"""Read and write, by dense names, the weights of modules that train other tensors in their place (LoRA, ...)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clmerge.weights.factored import Product
from clmerge.weights.parametrized import Parametrized
from clmerge.weights.peft_layers import seen_as_dense
from clmerge.weights.selection import COMPILE_PREFIX, choose
from clmerge.weights.swap import check_present, full_copy, own_tensors
from clmerge.weights.task_vector import State, TaskVector, apply_task_vector, task_vector

# Names of factors in adapters of other libraries (loralib, torchtune, diffusers, LyCORIS, PEFT).
_FACTOR = re.compile(
    r"(?:^|\.)(?:lora_(?:embedding_)?[ABab]|lora_E|lora_(?:up|down)|lora\.(?:up|down)|lora_magnitude_vector"
    r"|hada_[wt]\d|lokr_[wt]\d|vera_[AB]|vera_lambda_[bd]|ia3_l|oft_[RrSs]|boft_[RSs])(?:[._]|$)"
)


def parametrized(module: nn.Module) -> dict[str, Parametrized]:
    """Return the parametrized submodules that hold dense weights, outermost first, by prefix (``"a.b."``, ``""``)."""
    return {f"{path}.".replace(COMPILE_PREFIX, "") if path else "": part for path, part in _to_ask(module).items()}


def own_names(module: nn.Module) -> dict[str, str]:
    """Return dense name -> own name of all parameters and buffers except inner parameters."""
    return _own_names(parametrized(module), own_tensors(module))


def dense_weights(module: nn.Module, names: Iterable[str], *, origin: str = "the task vector") -> dict[str, Tensor]:
    """Return the current dense weights of a module by name; differentiable.

    Args:
        module: Any module; ordinary parameters and buffers are returned themselves, not copied.
        names: Dense names.
        origin: Source of the names, for the error message.

    Raises:
        RuntimeError: If the module lacks one of the names.
    """
    names = list(names)
    layout = _Layout(module, names, origin=origin)
    weights = dict(layout.plain)
    for prefix, part, _ in layout.parts:
        weights |= {prefix + name: tensor for name, tensor in part.dense().items()}
    return {name: weights[name] for name in names}


def merged_parameters(
    module: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] = (), *, frozen: bool = False
) -> dict[str, Tensor]:
    """Select the merged weights: ordinary trained parameters, and dense weights that inner parameters change.

    Args:
        module: The module, tuned in any mode, compiled or not.
        include: Glob patterns over dense names, as for ``select_parameters``; default all trained weights.
        exclude: Glob patterns of weights to leave out.
        frozen: Whether parameters that are frozen now count as trained, because they will be trained later.

    Returns:
        Dense weights by name, in the module's order; ordinary parameters themselves, others differentiable.

    Raises:
        ValueError: As ``select_parameters`` does.
    """
    return dense_weights(module, merged_names(module, include, exclude, frozen=frozen))


def merged_names(
    module: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] = (), *, frozen: bool = False
) -> list[str]:
    """Return the names of ``merged_parameters`` without computing dense weights; same arguments."""
    parts = parametrized(module)
    moved = set[str]()
    parameters = _all_parameters(module)
    for prefix, part in parts.items():
        if frozen or any(parameters[prefix + name].requires_grad for name in part.inner()):
            moved |= {prefix + name for name in part.names()}
    groups = {
        group[0]: (
            group,
            parameter.is_floating_point() and (frozen or parameter.requires_grad or not moved.isdisjoint(group)),
        )
        for parameter, group in _aliases(parts, parameters).items()
    }
    names = choose(groups, include, exclude, owner=type(module).__name__)
    if factors := [name for name in names if _FACTOR.search(name)]:
        raise ValueError(
            f"expected dense weights to merge in {type(module).__name__}, got {len(factors)} factors of "
            f"adapters, the first {factors[0]!r}: the product of merged factors is not the merge of their products; "
            "tune with clmerge.models.add_lora or PEFT's LoRA, whose products are merged, or name them in exclude="
        )
    return names


def unmerged_parameters(
    module: nn.Module, merged: Container[str], include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Return the ordinary parameters that match the patterns but are not merged, frozen or not, by dense name.

    Args:
        module: The module.
        merged: Names of the merged weights.
        include: As for ``merged_parameters``.
        exclude: As for ``merged_parameters``.
    """
    own, tensors = own_names(module), own_tensors(module)
    names = merged_names(module, include, exclude, frozen=True)
    return {name: tensors[own[name]] for name in names if name not in merged and name in own}


def tied_names(module: nn.Module) -> dict[str, list[str]]:
    """Return, for every parameter with several dense names, the first name -> the others."""
    groups = _aliases(parametrized(module), _all_parameters(module)).values()
    return {group[0]: group[1:] for group in groups if len(group) > 1}


def read_task_vector(
    module: nn.Module, base: State, *, device: torch.device | None = None, origin: str = "the base model"
) -> TaskVector:
    """Return the task vector ``theta - theta_0`` by dense names; sharded tensors are gathered.

    Args:
        module: The trained module.
        base: theta_0 by dense names.
        device: Device of the vector; default that of the module's tensors.
        origin: Source of the base, for the error message.

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
    """Return thin factors of the task vector, for the dense weights whose factors are known.

    Args:
        module: The trained module.
        base: theta_0 by dense names.
        origin: Source of the base, for the error message.
    """
    found: dict[str, Product] = {}
    for prefix, part, local in _Layout(module, base, origin=origin).parts:
        factors = part.low_rank({name: base[prefix + name] for name in local})
        found |= {prefix + name: factor for name, factor in factors.items()}
    return found


def state_of(
    module: nn.Module, base: State, tau: State, *, buffers: State | None = None, origin: str = "the base model"
) -> dict[str, Tensor]:
    """Return tensors, by the module's own names, with which a module computes ``base + tau`` in its mode of tuning.

    Args:
        module: The module that the tensors are for; it is not changed.
        base: theta_0 by dense names.
        tau: The vector to add, by dense names; weights that it lacks keep the base's values.
        buffers: Other tensors by dense names, used unchanged.
        origin: Source of the base, for the error message.

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


def running_statistics(module: nn.Module, *, counts: bool = False) -> dict[str, Tensor]:
    """Return copies on the CPU of a module's running statistics (BatchNorm's means and variances) by dense name.

    Args:
        module: The module.
        counts: Whether to include the numbers of batches (``num_batches_tracked``).
    """
    buffers = {name.replace(COMPILE_PREFIX, "") for name, _ in module.named_buffers()}
    tensors = own_tensors(module)
    return {
        name: full_copy(tensors[own], torch.device("cpu"))
        for name, own in own_names(module).items()
        if own in buffers
        and (
            (tensors[own].is_floating_point() and own.rsplit(".", 1)[-1].startswith("running_"))
            or (counts and own.rsplit(".", 1)[-1] == "num_batches_tracked")
        )
    }


def renew(module: nn.Module, *, seed: int, task: int) -> None:
    """Start a task: every parametrized submodule keeps its function and draws new inner parameters.

    Args:
        module: The module; changed in place.
        seed: Seed of the run.
        task: Index of the task. The numbers depend only on seed, task and the submodule's name.
    """
    for prefix, part in parametrized(module).items():
        digest = hashlib.sha256(f"renew/{seed}/{task}/{prefix}".encode()).digest()
        part.renew(torch.Generator().manual_seed(int.from_bytes(digest[:8], "big")))


@contextmanager
def folded(module: nn.Module) -> Iterator[nn.Module]:
    """Run a block with the parametrized submodules replaced by ordinary ones with the same dense weights.

    Inside the block, parameter names are dense names, as in the module before it was parametrized.

    Args:
        module: The module; its parametrized submodules are always restored.

    Yields:
        The folded module: ``module`` itself with submodules replaced, or a new one if it is parametrized as a whole.
    """
    parts = dict(reversed(_to_ask(module).items()))  # from the inside out: a folded part may hold folded ones
    whole = parts.pop("", None)
    own = {path: module.get_submodule(path) for path in parts}
    try:
        for path, part in parts.items():
            module.set_submodule(path, part.folded())
        yield module if whole is None else whole.folded()
    finally:
        for path, replaced in reversed(own.items()):
            module.set_submodule(path, replaced)


class _Layout:
    """Location of dense names in a module: ordinary tensors, and names relative to each parametrized submodule."""

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


def _all_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters, tied ones under each of their names."""
    named = module.named_parameters(remove_duplicate=False)
    return {name.replace(COMPILE_PREFIX, ""): parameter for name, parameter in named}


def _aliases(parts: dict[str, Parametrized], parameters: Mapping[str, nn.Parameter]) -> dict[nn.Parameter, list[str]]:
    """Return all dense names of every parameter that is not an inner one."""
    inner = {prefix + name for prefix, part in parts.items() for name in part.inner()}
    aliases: dict[nn.Parameter, list[str]] = {}
    for name, parameter in parameters.items():
        if name not in inner:
            aliases.setdefault(parameter, []).append(_dense_name(parts, name))
    return aliases


def _dense_name(parts: dict[str, Parametrized], own: str) -> str:
    for prefix, part in reversed(parts.items()):
        if own.startswith(prefix):
            return prefix + part.dense_name(own.removeprefix(prefix))
    return own


def _to_ask(module: nn.Module) -> dict[str, Parametrized]:
    found: dict[str, Parametrized] = {}
    closed: list[str] = []
    for path, part in module.named_modules():
        if any(path.startswith(prefix) for prefix in closed):
            continue
        asked = part if isinstance(part, Parametrized) else seen_as_dense(part, path)
        if asked is not None:
            found[path] = asked
            if asked.answers_for_children:
                closed.append(f"{path}." if path else "")
    return found
