"""Run one module with several sets of weights in turn, without copies; shared parts are computed once."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from clmerge.weights.selection import COMPILE_PREFIX

_MEMORY = 2**30


class Exchange:
    """Replace a module's tensors by reference; the module's own are restored at the end of the block.

    Parts of the module that have a matrix but none of the exchanged tensors are the same for all sets of weights. For
    the same input they are computed for the first set only, for example the lower blocks of a partly tuned network.
    Inputs are compared, and a part that receives a different one is no longer shared. Compiled modules are computed
    as a whole.

    Args:
        module: The module.
        names: Parameters and buffers that are exchanged, by the module's own names; all names of tied ones.
        share: Whether equal parts are computed once. Their output must depend on their arguments alone, as in
            evaluation mode.
        memory: Maximum bytes of kept inputs and outputs.

    Raises:
        KeyError: If the module has no tensor with one of the names.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> with Exchange(model, ["1.weight"]) as exchange, torch.no_grad():
        ...     for value in (2.0, 3.0):
        ...         exchange.put({"1.weight": torch.tensor([[value]])})
        ...         ratio = model(torch.ones(1, 1)) / model[0].weight
        ...         print(round(float(ratio), 3))
        2.0
        3.0
    """

    def __init__(self, module: nn.Module, names: Iterable[str], *, share: bool = False, memory: int = _MEMORY) -> None:
        places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for part in module.modules():
            stores: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for store in stores:
                for key, tensor in store.items():
                    if tensor is not None:
                        places.setdefault(id(tensor), []).append((store, key))
        own = dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)))
        self._originals = {name: own[name] for name in names}
        self._places = {name: places[id(tensor)] for name, tensor in self._originals.items()}
        exchanged = {id(tensor) for tensor in self._originals.values()}
        compiled = any(COMPILE_PREFIX in name for name in own)
        self._parts = [_SharedPart(part, self) for part in _alike(module, exchanged)] if share and not compiled else []
        self.memory = memory
        self.used = 0

    def __enter__(self) -> Self:
        for part in self._parts:
            part.watch()
        return self

    def __exit__(self, *exception: object) -> None:
        self.put({})
        for part in self._parts:
            part.leave()

    def put(self, state: Mapping[str, Tensor]) -> None:
        """Put these tensors into the module.

        Args:
            state: Tensors by name, on the module's device; the module's own are used for missing names.
        """
        for name, places in self._places.items():
            tensor = state.get(name, self._originals[name])
            for store, key in places:
                store[key] = tensor

    def next_input(self) -> None:
        """Discard kept inputs and outputs before the next batch."""
        self.used = 0
        for part in self._parts:
            part.forget()


class _SharedPart:
    """A part of a module that is the same for all sets of weights, with its last input and output."""

    def __init__(self, part: nn.Module, owner: Exchange) -> None:
        self._part, self._owner = part, owner
        self._forward: Callable[..., Any] = part.forward
        self._arguments: tuple[Any, ...] | None = None
        self._output: Any = None

    def watch(self) -> None:
        self._part.forward = self._call

    def leave(self) -> None:
        self.forget()
        self._part.__dict__.pop("forward", None)

    def forget(self) -> None:
        self._arguments = self._output = None

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *(item for pair in sorted(kwargs.items()) for item in pair))
        if self._arguments is not None:
            if _equal(given, self._arguments):
                return self._output.clone()
            self.leave()
            return self._forward(*args, **kwargs)
        output = self._forward(*args, **kwargs)
        size = sum(x.nbytes for x in (*given, output) if isinstance(x, Tensor))
        if isinstance(output, Tensor) and self._owner.used + size <= self._owner.memory:
            self._owner.used += size
            # Copies, because the caller may change the input or the output in place.
            self._arguments = tuple(x.clone() if isinstance(x, Tensor) else x for x in given)
            self._output = output.clone()
        return output


def _alike(module: nn.Module, exchanged: set[int]) -> list[nn.Module]:
    """Return the largest parts below ``module`` that have a matrix and none of the exchanged tensors."""
    found: list[nn.Module] = []
    for child in module.children():
        tensors = [*child.parameters(), *child.buffers()]
        if any(id(tensor) in exchanged for tensor in tensors):
            found += _alike(child, exchanged)
        elif any(tensor.ndim > 1 for tensor in child.parameters()):
            # A container that is only iterated over is never called, but its children are.
            found += [child] if type(child).forward is not nn.Module.forward else _alike(child, exchanged)
    return found


def _equal(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> bool:
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if a is b:
            continue
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            if isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
                return False
        elif a.dtype != b.dtype or a.device != b.device or not torch.equal(a, b):
            return False
    return True
