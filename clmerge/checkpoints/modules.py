"""Read the parameters of pickled modules and of TorchScript archives, by the names of their state dict; run nothing."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from clmerge.checkpoints.pickled import StandIn, StoredTensor, UnreadTensor
from clmerge.checkpoints.torch_file import TorchFile

State = dict[str, StoredTensor | UnreadTensor]

_SCRIPT = "__torch__."
_MOST, _DEEPEST, _LONGEST = 100_000, 100, 10_000
_LISTS = ("  __parameters__ = [", "  __buffers__ = [")
_LISTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
# What archives of CLIP keep among the weights, and no state dict of the models has: sizes, and the causal mask.
_SETTINGS = {"input_resolution", "context_length", "vocab_size"}
_MASK = "attn_mask"


class ModulesOf:
    """Put state dicts in the place of the modules that a file holds: of the whole content, or of a key's value.

    Args:
        file: The file; its ``content`` is changed.

    Attributes:
        root: Class of the module that the whole content is; empty if it is none.

    Raises:
        ValueError: If modules hold each other or are nested too deeply, or there are too many.
    """

    def __init__(self, file: TorchFile) -> None:
        self.root = ""
        self._file = file
        self._read: set[str] = set()
        self._declared: dict[str, set[str] | None] = {}
        if _is_module(file.content):
            self.root = file.content.path.removeprefix(_SCRIPT)
            file.content = self._state(file.content)
        elif isinstance(file.content, dict):
            for key, value in [*file.content.items()]:
                if _is_module(value):
                    file.content[key] = self._state(value)

    def others(self, ignored: Iterable[str]) -> list[str]:
        """Return the ignored classes without those of modules, whose tensors are read."""
        inner = ("torch.jit._pickle.", _SCRIPT)
        return [path for path in ignored if path not in self._read and not (self._read and path.startswith(inner))]

    def _state(self, module: StandIn) -> State:
        found: State = {}
        stack: list[tuple[str, StandIn, int]] = [("", module, 0)]
        count = 0
        while stack:
            prefix, one, depth = stack.pop()
            count += 1
            if count > _MOST or depth > _DEEPEST or len(prefix) > _LONGEST:
                raise ValueError(
                    f"expected a module of at most {_MOST:,} parts, {_DEEPEST} deep, in {self._file.path}, got more, "
                    "or modules that hold each other; save its state_dict"
                )
            self._read.add(one.path)
            tensors, children = self._parts(one)
            found |= {prefix + name: tensor for name, tensor in tensors}
            stack += [(f"{prefix}{name}.", child, depth + 1) for name, child in reversed(children)]
        if not found:
            raise ValueError(
                f"expected the parameters of {module.path} in {self._file.path}, got none, as after torch.jit.freeze; "
                "save the state_dict of the module that it was made from"
            )
        return found

    def _parts(
        self, module: StandIn
    ) -> tuple[list[tuple[str, StoredTensor | UnreadTensor]], list[tuple[str, StandIn]]]:
        """Return the tensors and the modules that a module holds, by name."""
        state = module.state
        if not module.path.startswith(_SCRIPT):
            unsaved = state.get("_non_persistent_buffers_set")
            left = set(unsaved.members) if isinstance(unsaved, StandIn) else set()
            own = [*_items(state["_parameters"]), *((n, t) for n, t in _items(state.get("_buffers")) if n not in left)]
            tensors = [(name, value) for name, value in own if isinstance(value, StoredTensor | UnreadTensor)]
            return tensors, [(name, value) for name, value in _items(state["_modules"]) if _is_module(value)]
        declared = self._declared_by(module.path)
        items = [*_items(state)]
        tensors = [
            (name, value)
            for name, value in items
            if isinstance(value, StoredTensor | UnreadTensor)
            and (declared is None or name in declared)
            and not (name in _SETTINGS and isinstance(value, StoredTensor) and not value.shape)
            and name != _MASK
        ]
        return tensors, [(name, value) for name, value in items if _is_module(value)]

    def _declared_by(self, path: str) -> set[str] | None:
        """Return the names that a class of TorchScript declares as parameters and buffers; None if it is not found."""
        if path not in self._declared:
            owner, kind = path.rpartition(".")[0], ""
            for line in self._file.code(owner).splitlines():
                if line.startswith("class "):
                    kind = f"{owner}.{line.removeprefix('class ').partition('(')[0]}"
                elif kind and line.startswith(_LISTS):
                    names = self._declared.get(kind) or set()
                    self._declared[kind] = names | {*_LISTED.findall(line)}
            self._declared.setdefault(path, None)
        return self._declared[path]


def _is_module(value: Any) -> bool:
    if not isinstance(value, StandIn) or not isinstance(value.state, Mapping):
        return False
    kinds = (value.state.get("_parameters"), value.state.get("_modules"))
    return value.path.startswith(_SCRIPT) or all(isinstance(kind, Mapping) for kind in kinds)


def _items(mapping: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(mapping, Mapping):
        yield from ((name, value) for name, value in mapping.items() if isinstance(name, str))
