"""Read a pickle without executing it: containers are built, tensors described, other objects replaced by stand-ins.

``pickletools`` parses the stream; nothing is imported, and only functions of this file are called. Tensors are
described, not built, so that ``clmerge.checkpoints.torch_file`` can check them against the content of the file.
"""

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import torch

_DTYPES = {
    f"torch.{name}": getattr(torch, name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)
}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
# Classes of plain values and parts of tensors, which are not listed among the ignored ones.
_QUIET = {
    *_DTYPES,
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("frozenset", "bytearray")),
    *("torch.Size", "torch.device", "torch.serialization._get_layout", "_codecs.encode", "collections.Counter"),
    *("builtins.object", "__builtin__.object"),
}
_FAULTS = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, struct.error)


class StandIn(dict[Any, Any]):
    """Placeholder for an object of an unknown class: the class, and the items if it is a kind of dictionary.

    Args:
        path: Dotted path of the class.

    Attributes:
        state: The object's attributes, if the pickle has them.
        members: The texts in it, if it is a set.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.state: Any = None
        self.members: list[str] = []

    __hash__ = object.__hash__  # type: ignore[assignment]


@dataclass(frozen=True)
class Global:
    """The name of a class or function."""

    path: str


@dataclass(frozen=True)
class Storage:
    """Numbers in a file: ``numel`` of the ``total`` entries of the record ``key``, from ``start`` on."""

    dtype: torch.dtype
    key: str
    total: int
    start: int
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A dense tensor: a strided view of a storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class UnreadTensor:
    """A tensor in an unsupported layout, such as a sparse or quantised one."""

    how: str


@dataclass
class Pickle:
    """The content of one pickle.

    Attributes:
        value: Its object.
        end: Offset of its end in the data.
        ignored: Classes whose objects were left out.
        items: Bytes per entry by storage.
    """

    value: Any
    end: int
    ignored: list[str]
    items: dict[str, int]


def unpickled(data: bytes | memoryview, start: int = 0) -> Pickle:
    """Read one pickle.

    Args:
        data: The data with the pickle.
        start: Offset of its beginning.

    Raises:
        ValueError: If the pickle is damaged.
    """
    machine = _Machine()
    try:
        return machine.run(BytesIO(data[start:]), start)
    except _FAULTS as error:
        raise ValueError(f"a damaged pickle ({type(error).__name__}: {str(error)[:80]})") from error


class _Machine:
    """The stack machine that interprets a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[Any, Any] = {}
        self.ignored: dict[str, None] = {}
        self.items: dict[str, int] = {}

    def run(self, stream: BytesIO, start: int) -> Pickle:
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name == "STOP":
                return Pickle(self.stack.pop(), start + stream.tell(), list(self.ignored), self.items)
            if name in _PUSHED:
                self.stack.append(argument)
            elif name in _PUTS:
                self.memo[argument] = self.stack[-1]
            elif name in _GETS:
                self.stack.append(self.memo[argument])
            else:
                _STEPS[name](self, argument)
        raise ValueError("no end")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def past_mark(self) -> list[Any]:
        found, self.stack = self.stack, self.marks.pop()
        return found

    def mark(self, argument: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop(self, argument: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.past_mark()

    def add(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)

    def put(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise ValueError("a key without a value")
        if isinstance(target, dict):
            # Other keys do not name tensors, and hashing nested tuples may take unbounded time.
            pairs = zip(items[::2], items[1::2], strict=True)
            target.update((key, value) for key, value in pairs if isinstance(key, str | int | float | bytes))

    def join(self, argument: Any) -> None:
        items, target = self.past_mark(), self.stack[-1]
        if isinstance(target, StandIn):
            target.members.extend(item for item in items if isinstance(item, str))

    def build(self, argument: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, StandIn):
            target.state = state

    def frozen(self, argument: Any) -> None:
        self.past_mark()
        self.push(StandIn("frozenset"))

    def dictionary(self, argument: Any) -> None:
        items = self.past_mark()
        self.stack.append({})
        self.put(items)

    def by_name(self, path: str) -> None:
        self.stack.append(Global(path))
        is_storage = path.startswith("torch.") and path.endswith("Storage")
        if path not in _CALLS and path not in _QUIET and not is_storage:
            self.ignored[path] = None

    def from_stack(self, argument: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("a class whose name is no text")
        self.by_name(f"{module}.{name}")

    def instance(self, argument: Any) -> None:
        items = self.past_mark()
        self.by_name(argument.replace(" ", "."))
        self.stack.append(_called(self.stack.pop(), tuple(items)))

    def made(self, drop: int = 0) -> None:
        del self.stack[len(self.stack) - drop :]
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_called(function, arguments))

    def of_mark(self, argument: Any) -> None:
        function, *arguments = self.past_mark()
        self.stack.append(_called(function, tuple(arguments)))

    def persistent(self, argument: Any) -> None:
        found = _stored(*self.stack.pop())
        if isinstance(found, Storage):
            self.items[found.key] = found.dtype.itemsize
        self.stack.append(found)

    def last(self, count: int) -> None:
        taken = self.stack[-count:]
        if len(taken) < count:
            raise ValueError("a tuple of more than there is")
        self.stack[-count:] = [tuple(taken)]


def _called(function: Any, arguments: Any) -> Any:
    """Return a container, a description or a stand-in for the result of a call."""
    if not isinstance(function, Global):
        return StandIn(getattr(function, "path", type(function).__name__))
    if function.path in _CALLS and isinstance(arguments, tuple):
        return _CALLS[function.path](*arguments)
    if function.path.startswith(("torch._utils._rebuild_", "torch.distributed.")):
        return UnreadTensor(function.path.rpartition(".")[2].removeprefix("_rebuild_").replace("_", " "))
    return StandIn(function.path)


def _dictionary(*arguments: Any) -> dict[Any, Any]:
    """Return an ordered or default dictionary; old pickles pass the items as pairs."""
    found: dict[Any, Any] = {}
    for pair in arguments[0] if arguments and isinstance(arguments[0], list) else ():
        key, value = pair
        if isinstance(key, str | int):
            found[key] = value
    return found


def _set(items: Any = None, *rest: Any) -> StandIn:
    found = StandIn("set")
    found.members = [item for item in items if isinstance(item, str)] if isinstance(items, list) else []
    return found


def _reconstructed(kind: Any, *rest: Any) -> StandIn:
    """Return a stand-in for an object that copyreg makes, as in the oldest protocols."""
    return StandIn(kind.path if isinstance(kind, Global) else "object")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> StoredTensor | UnreadTensor:
    """Describe a tensor; ``rest`` is requires_grad, hooks, and flags that change the meaning of its bits."""
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    sizes = []
    for side in (shape, stride, (offset,)):
        if not (isinstance(side, tuple) and all(type(x) is int and 0 <= x < 1 << 62 for x in side)):
            raise ValueError("a tensor whose shape, stride or offset is no row of sizes")
        sizes.append(side)
    if len(shape) != len(stride):
        raise ValueError(f"a tensor with a shape of {len(shape)} and a stride of {len(stride)} numbers")
    if len(rest) > 2 and rest[2]:
        return UnreadTensor("conjugated or negated")
    return StoredTensor(storage, storage.dtype, offset, shape, stride)


def _typed_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, flags: Any = None
) -> StoredTensor | UnreadTensor:
    """Describe a tensor of a dtype without a storage class of its own."""
    found = _tensor(storage, offset, shape, stride, grad, hooks, flags)
    if not (isinstance(dtype, Global) and dtype.path in _DTYPES):
        raise ValueError("a tensor of an unknown dtype")
    return found if isinstance(found, UnreadTensor) else replace(found, dtype=_DTYPES[dtype.path])


def _stored(kind: Any, *data: Any) -> Any:
    """Return the object of a persistent id: a storage, or in old files the class of a module."""
    if kind in ("module", b"module"):
        return data[0]
    storage_class, key, _, numel, *view = data
    name = storage_class.path.rpartition(".")[2] if isinstance(storage_class, Global) else ""
    if kind not in ("storage", b"storage") or name not in _STORAGES or type(numel) is not int or numel < 0:
        raise ValueError(f"a storage of the unknown kind {name!r}")
    if not isinstance(key, str | int):
        raise ValueError("a storage without a name")
    start, part = (view[0][1], view[0][2]) if view and view[0] else (0, numel)
    if type(start) is not int or type(part) is not int or min(start, part) < 0 or start + part > numel:
        raise ValueError("a view beyond the end of its storage")
    return Storage(_STORAGES[name], str(key), numel, start, part)


_CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": lambda *arguments: {},
    "builtins.dict": _dictionary,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "copyreg._reconstructor": _reconstructed,
    "copy_reg._reconstructor": _reconstructed,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, arguments, state: _called(function, arguments),
    "torch.nn.parameter.Parameter": lambda data=None, *rest: data,
}
"""All functions that a pickle can call."""

_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_STEPS: Mapping[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": lambda m, a: m.past_mark(),
    "DUP": lambda m, a: m.push(m.stack[-1]),
    "NONE": lambda m, a: m.push(None),
    "NEWTRUE": lambda m, a: m.push(True),
    "NEWFALSE": lambda m, a: m.push(False),
    "EMPTY_LIST": lambda m, a: m.push([]),
    "EMPTY_DICT": lambda m, a: m.push({}),
    "EMPTY_TUPLE": lambda m, a: m.push(()),
    "EMPTY_SET": lambda m, a: m.push(StandIn("set")),
    "FROZENSET": _Machine.frozen,
    "ADDITEMS": _Machine.join,
    "APPEND": lambda m, a: m.add([m.stack.pop()]),
    "APPENDS": lambda m, a: m.add(m.past_mark()),
    "LIST": lambda m, a: m.push(m.past_mark()),
    "TUPLE": lambda m, a: m.push(tuple(m.past_mark())),
    "TUPLE1": lambda m, a: m.last(1),
    "TUPLE2": lambda m, a: m.last(2),
    "TUPLE3": lambda m, a: m.last(3),
    "DICT": _Machine.dictionary,
    "SETITEM": lambda m, a: m.put([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, a: m.put(m.past_mark()),
    "MEMOIZE": lambda m, a: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    "GLOBAL": lambda m, a: m.by_name(a.replace(" ", ".")),
    "STACK_GLOBAL": _Machine.from_stack,
    "EXT1": lambda m, a: m.by_name(f"copyreg extension {a}"),
    "EXT2": lambda m, a: m.by_name(f"copyreg extension {a}"),
    "EXT4": lambda m, a: m.by_name(f"copyreg extension {a}"),
    "INST": _Machine.instance,
    "OBJ": _Machine.of_mark,
    "REDUCE": lambda m, a: m.made(),
    "NEWOBJ": lambda m, a: m.made(),
    "NEWOBJ_EX": lambda m, a: m.made(drop=1),
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
