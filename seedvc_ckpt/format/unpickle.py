"""A pickle reader that can only build plain data and describe tensors.

It knows the operations that torch's own ``weights_only`` reader knows, resolves names against a fixed list, imports
nothing and calls nothing that a file chooses. What tensors become is up to a `Builder`.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from seedvc_ckpt.errors import UnsafeCheckpointError

__all__ = ["DIFFERENTIABLE", "ITEM_SIZES", "STORAGE_TYPES", "Builder", "Storage", "list_globals", "unpickle"]

ITEM_SIZES = {
    **dict.fromkeys(["bool", "uint8", "int8"], 1),
    **dict.fromkeys(["uint16", "int16", "float16", "bfloat16"], 2),
    **dict.fromkeys(["uint32", "int32", "float32", "complex32"], 4),
    **dict.fromkeys(["uint64", "int64", "float64", "complex64"], 8),
    "complex128": 16,
    **dict.fromkeys(["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"], 1),
}
"""Bytes of one element of each torch dtype that a checkpoint may hold."""

STORAGE_TYPES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex128": "ComplexDoubleStorage",
    "complex64": "ComplexFloatStorage",
}
"""torch's storage class for each dtype that has one; tensors of other dtypes sit in untyped storages."""

DIFFERENTIABLE = re.compile("b?float|complex")
"""Matches the dtypes whose tensors may require a gradient."""

_STORAGE_DTYPES = {name: dtype for dtype, name in STORAGE_TYPES.items()}
_MAX_OPERATIONS = 2_000_000  # more than any model's state needs; bounds time and memory of a hostile pickle
_MAX_UNFOLDED = 1 << 30  # bytes that a tensor whose elements share memory may have; bounds what copying it takes
_MAX_NUMBER = 1 << 62
_MAX_DIMENSIONS = 64
_MAX_KEY_ITEMS = 16
_MAX_TUPLE_KEYS = 10_000  # keys chosen to collide take quadratic time
_DEVICE = re.compile(r"[a-z]{1,20}(:[0-9]{1,2})?")


@dataclass(frozen=True)
class Storage:
    """A storage that a pickle refers to: one record of the file.

    Attributes:
        key: Name of the record, below ``data/``.
        dtype: Element type; "uint8" for an untyped storage.
        numel: Number of elements.
    """

    key: str
    dtype: str
    numel: int

    @property
    def nbytes(self) -> int:
        """Size of the record."""
        return self.numel * ITEM_SIZES[self.dtype]


class Builder(Protocol):
    """Makes the values that are torch's own."""

    def tensor(
        self,
        storage: Storage,
        dtype: str,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        *,
        requires_grad: bool,
    ) -> Any:
        """A tensor over `storage`; offset and strides count elements of `dtype` and lie inside the storage."""

    def parameter(self, tensor: Any, *, requires_grad: bool) -> Any:
        """A ``torch.nn.Parameter`` over a tensor of this builder."""

    def value(self, kind: str, argument: Any) -> Any:
        """A ``torch.dtype`` or ``torch.device`` from its name, or a ``torch.Size`` from a tuple of lengths."""


_Kind = TypeVar("_Kind")
_Sized = TypeVar("_Sized", bound=Sized)


class _RefusedError(Exception):
    """The pickle holds what must not, or can't, be read."""


class _Global:
    """A name in the pickle, resolved to what it stands for here."""

    __slots__ = ("call", "dtype", "name")

    def __init__(self, name: str, call: Callable[..., Any] | None = None, dtype: str = "") -> None:
        self.name = name
        self.call = call
        self.dtype = dtype


def unpickle(data: bytes, builder: Builder, name: str) -> Any:
    """The object that `data` describes; `name` is the file, for errors.

    Raises:
        UnsafeCheckpointError: for an operation, a name or an argument that plain data and tensors don't need.
    """
    try:
        return _Machine(data, builder).run()
    except _RefusedError as problem:
        raise UnsafeCheckpointError(
            f"{name}: {problem}. Nothing of it was run or loaded; if you trust where it comes from, save it again "
            "with plain numbers, strings, lists, dicts and tensors only"
        ) from None
    except (
        IndexError,
        KeyError,
        struct.error,
        UnicodeDecodeError,
        TypeError,
        ValueError,
        OverflowError,
        RuntimeError,
    ) as problem:
        raise UnsafeCheckpointError(f"{name}: its pickle is malformed ({problem}); nothing was loaded") from None


def list_globals(data: bytes) -> list[str]:
    """The names that a pickle asks for, sorted, without resolving or loading anything.

    Names that a pickle could assemble from pieces on its stack are reported as ``?``.
    """
    import pickletools

    found: set[str] = set()
    strings = deque(["?", "?"], maxlen=2)
    try:
        for operation, argument, _ in islice(pickletools.genops(data), _MAX_OPERATIONS):
            if operation.name in ("GLOBAL", "INST"):
                found.add(str(argument).replace(" ", ".", 1))
            elif operation.name == "STACK_GLOBAL":
                found.add(".".join(strings))
            elif isinstance(argument, str):
                strings.append(argument)
    except Exception as error:  # noqa: BLE001 - pickletools raises many kinds for a damaged pickle
        found.add(f"(the pickle ends in an error: {error})")
    return sorted(found)


class _Machine:
    """A stack machine for the operations of pickle protocol 2 that torch writes."""

    def __init__(self, data: bytes, builder: Builder) -> None:
        self.data = data
        self.at = 0
        self.builder = builder
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.dtypes: dict[str, Any] = {}
        self.tuple_keys = 0
        self.copyable = 2 * len(data)

    def run(self) -> Any:
        data, operations = self.data, _OPERATIONS
        for _ in range(_MAX_OPERATIONS):
            code = data[self.at]
            self.at += 1
            if code == _STOP:
                if len(self.stack) != 1 or self.marks or self.at != len(data):
                    raise _RefusedError("its pickle leaves something over at the end")
                return _plain(self.stack[0])
            operation = operations.get(code)
            if operation is None:
                raise _RefusedError(f"its pickle has operation {code:#04x}, which torch does not write")
            operation(self)
        raise _RefusedError(f"its pickle has more than {_MAX_OPERATIONS:,} operations")

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise _RefusedError("its pickle ends in the middle of a value")
        found = self.data[self.at : end]
        self.at = end
        return found

    def line(self) -> str:
        end = self.data.index(b"\n", self.at, self.at + 512)
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

    def number(self, layout: struct.Struct) -> Any:
        (value,) = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return value

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def proto(self) -> None:
        version = self.take(1)[0]
        if version != 2:
            raise _RefusedError(f"its pickle has protocol {version}; torch writes, and reads safely, protocol 2")

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def long1(self) -> None:
        self.stack.append(int.from_bytes(self.take(self.take(1)[0]), "little", signed=True))

    def text(self) -> None:
        self.stack.append(self.take(self.number(_UINT32)).decode())

    def short_text(self) -> None:
        self.stack.append(self.take(self.take(1)[0]).decode())

    def append(self) -> None:
        item = self.stack.pop()
        _exactly(self.stack[-1], list).append(_plain(item))

    def appends(self) -> None:
        items = self.pop_mark()
        _exactly(self.stack[-1], list).extend(map(_plain, items))

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.fill(self.stack[-1], [key], [value])

    def set_items(self) -> None:
        items = self.pop_mark()
        self.fill(self.stack[-1], items[0::2], items[1::2])

    def fill(self, target: Any, keys: Iterable[Any], values: Iterable[Any]) -> None:
        if type(target) not in (dict, OrderedDict):
            raise _RefusedError(f"its pickle uses a {type(target).__name__} as a dict")
        for key, value in zip(keys, values, strict=True):
            target[self.hashable(key)] = _plain(value)

    def hashable(self, key: Any) -> Any:
        # nested tuples are left out: hashing a deeply shared one takes exponential time
        items = (key,)
        if type(key) is tuple:
            items = key[: _MAX_KEY_ITEMS + 1]
            self.tuple_keys += 1
        if len(items) > _MAX_KEY_ITEMS or self.tuple_keys > _MAX_TUPLE_KEYS:
            raise _RefusedError(f"it has a key of more than {_MAX_KEY_ITEMS} items, or {_MAX_TUPLE_KEYS:,} such keys")
        for item in items:
            if type(item) is int and not -_MAX_NUMBER < item < _MAX_NUMBER:
                raise _RefusedError("it has a whole number beyond 62 bits as a key")
            if item is not None and type(item) not in (str, int, float, bool, bytes):
                raise _RefusedError(
                    f"it has a key with a {type(item).__name__}: only numbers, strings and tuples of them are"
                )
        return key

    def copied(self, argument: Any, kind: type[_Sized]) -> _Sized:
        """An argument to be copied: all of them together are small unless the pickle repeats some."""
        found = _exactly(argument, kind)
        self.copyable -= len(found)
        if self.copyable < 0:
            raise _RefusedError("its pickle copies the same values again and again")
        return found

    def tuple_from_mark(self) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def tuple_of(self, count: int) -> None:
        items = self.stack[-count:]
        if len(items) < count:
            raise _RefusedError("its pickle takes more from the stack than there is")
        self.stack[-count:] = [tuple(items)]

    def global_(self) -> None:
        module, name = self.line(), self.line()
        found = _GLOBALS.get((module, name))
        if found is None:
            raise _RefusedError(f"it asks for {_shown(module + '.' + name)}, which is not on the list of plain data")
        self.stack.append(found if found.call else self.dtype(found.dtype))

    def dtype(self, name: str) -> Any:
        if name not in self.dtypes:
            self.dtypes[name] = self.builder.value("dtype", name)
        return self.dtypes[name]

    def reduce(self) -> None:
        arguments, function = _exactly(self.stack.pop(), tuple), self.stack.pop()
        if not isinstance(function, _Global) or function.call is None:
            raise _RefusedError(f"its pickle calls {_shown(function)}")
        self.stack.append(function.call(self, *arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is not OrderedDict or type(state) is not dict or set(state) != {"_metadata"}:
            raise _RefusedError(f"its pickle sets attributes of a {type(target).__name__}")
        # what module.state_dict() keeps beside its tensors; load_state_dict reads it
        target._metadata = state["_metadata"]  # type: ignore[attr-defined]  # noqa: SLF001

    def persistent(self) -> None:
        identity = _exactly(self.stack.pop(), tuple)
        if len(identity) != 5 or identity[0] != "storage":
            what = _shown(identity[0]) if identity else "nothing"
            raise _RefusedError(f"its pickle refers to {what}, which is no tensor's storage")
        _, kind, key, _, count = identity
        if not isinstance(kind, _Global) or not kind.dtype:
            raise _RefusedError(f"its pickle has a storage of an unknown kind, {_shown(kind)}")
        if not (type(key) is str and key.isascii() and key.isalnum()) or not 0 <= _integer(count) < _MAX_NUMBER:
            raise _RefusedError(f"its pickle has a storage with key {_shown(key)} and {count} elements")
        storage = self.storages.setdefault(key, Storage(key, kind.dtype, count))
        if (storage.dtype, storage.numel) != (kind.dtype, count):
            raise _RefusedError(f"its pickle describes the storage {key} in two ways")
        self.stack.append(storage)

    def tensor(self, *arguments: Any) -> Any:
        storage, offset, shape, stride, requires_grad, hooks, *rest = arguments
        if any(rest) or hooks or not isinstance(storage, Storage):
            raise _RefusedError("it has a tensor with hooks, conjugation or other unusual parts")
        return self._tensor(storage, storage.dtype, offset, shape, stride, requires_grad)

    def tensor_of_dtype(self, *arguments: Any) -> Any:
        storage, offset, shape, stride, requires_grad, hooks, dtype, *rest = arguments
        if any(rest) or hooks or not isinstance(storage, Storage) or storage.dtype != "uint8":
            raise _RefusedError("it has a tensor with hooks, conjugation or other unusual parts")
        name = next((name for name, known in self.dtypes.items() if known is dtype), None)
        if name is None:
            raise _RefusedError(f"it has a tensor of the unknown type {_shown(dtype)}")
        return self._tensor(storage, name, offset, shape, stride, requires_grad)

    def _tensor(
        self,
        storage: Storage,
        dtype: str,
        offset: Any,
        shape: Any,
        stride: Any,
        requires_grad: Any,
    ) -> Any:
        numbers = [_integer(number) for number in (offset, *_exactly(shape, tuple), *_exactly(stride, tuple))]
        if len(numbers) > 2 * _MAX_DIMENSIONS or min(numbers) < 0 or max(numbers) >= _MAX_NUMBER:
            raise _RefusedError("it has a tensor with a shape, strides or an offset that no memory can hold")
        if type(requires_grad) is not bool or len(shape) != len(stride):
            raise _RefusedError(f"it has a tensor of shape {shape} and strides {stride}")
        if requires_grad and not DIFFERENTIABLE.match(dtype):
            raise _RefusedError(f"it has a tensor of type {dtype} that requires a gradient")
        last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        if 0 not in shape and (last + 1) * ITEM_SIZES[dtype] > storage.nbytes:
            raise _RefusedError(f"it has a tensor of shape {shape} that reaches beyond its {storage.nbytes} bytes")
        size = math.prod(length or 1 for length in shape) * ITEM_SIZES[dtype]
        if size > (_MAX_NUMBER if 0 in shape else max(storage.nbytes, _MAX_UNFOLDED)):
            raise _RefusedError(f"it has a tensor of shape {shape}, {size:,} bytes unfolded from {storage.nbytes:,}")
        return self.builder.tensor(storage, dtype, offset, shape, stride, requires_grad=requires_grad)

    def parameter(self, tensor: Any, requires_grad: Any, hooks: Any) -> Any:
        if hooks or type(requires_grad) is not bool:
            raise _RefusedError("it has a parameter with hooks")
        return self.builder.parameter(tensor, requires_grad=requires_grad)


def _plain(value: Any) -> Any:
    if isinstance(value, _Global):
        raise _RefusedError(f"it holds {value.name} itself as a value")
    return value


def _exactly(value: Any, kind: type[_Kind]) -> _Kind:
    if type(value) is not kind:
        raise _RefusedError(f"its pickle uses a {type(value).__name__} as a {kind.__name__}")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise _RefusedError(f"its pickle has {_shown(value)} where a whole number belongs")
    return value


def _shown(value: Any) -> str:
    """A value for a message; never the contents of a container, which may unfold without end."""
    if isinstance(value, _Global):
        return value.name
    return ascii(value[:100])[1:-1] if isinstance(value, str) else f"a {type(value).__name__}"


def _ordered_dict(machine: _Machine, pairs: Any = None) -> OrderedDict[Any, Any]:
    made: OrderedDict[Any, Any] = OrderedDict()
    for pair in machine.copied(pairs, list) if pairs is not None else ():
        if type(pair) not in (list, tuple) or len(pair) != 2:
            raise _RefusedError("its pickle makes a dict of something else than pairs")
        machine.fill(made, pair[:1], pair[1:])
    return made


def _counter(machine: _Machine, counts: Any) -> Counter[Any]:
    return Counter(machine.copied(counts, dict))


def _set(machine: _Machine, items: Any) -> set[Any]:
    return set(map(machine.hashable, machine.copied(items, list)))


def _complex(_: _Machine, real: Any, imaginary: Any) -> complex:
    return complex(_exactly(real, float), _exactly(imaginary, float))


def _bytes(machine: _Machine, text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise _RefusedError(f"its pickle has bytes in the encoding {_shown(encoding)}")
    return machine.copied(text, str).encode("latin1")


def _bytearray(machine: _Machine, content: Any = b"", *encoding: Any) -> bytearray:
    return bytearray(_bytes(machine, content, *encoding) if encoding else machine.copied(content, bytes))


def _size(machine: _Machine, lengths: Any) -> Any:
    if any(not 0 <= _integer(length) < _MAX_NUMBER for length in machine.copied(lengths, tuple)):
        raise _RefusedError("it has a torch.Size with lengths that no tensor has")
    return machine.builder.value("Size", lengths)


def _device(machine: _Machine, kind: Any, *index: Any) -> Any:
    name = ":".join([_exactly(kind, str), *(str(_integer(number)) for number in index)])
    if not _DEVICE.fullmatch(name):
        raise _RefusedError(f"it has a device that torch does not know: {_shown(name)}")
    return machine.builder.value("device", name)


def _resolve() -> dict[tuple[str, str], _Global]:
    callables: dict[tuple[str, str], Callable[..., Any]] = {
        ("collections", "OrderedDict"): _ordered_dict,
        ("collections", "Counter"): _counter,
        ("__builtin__", "set"): _set,
        ("__builtin__", "complex"): _complex,
        ("__builtin__", "bytearray"): _bytearray,
        ("builtins", "set"): _set,
        ("builtins", "complex"): _complex,
        ("builtins", "bytearray"): _bytearray,
        ("_codecs", "encode"): _bytes,
        ("torch._utils", "_rebuild_tensor_v2"): _Machine.tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _Machine.tensor_of_dtype,
        ("torch._utils", "_rebuild_parameter"): _Machine.parameter,
        ("torch", "Size"): _size,
        ("torch", "device"): _device,
    }
    found = {key: _Global(".".join(key), call) for key, call in callables.items()}
    for dtype in ITEM_SIZES:
        found["torch", dtype] = _Global(f"torch.{dtype}", dtype=dtype)
    for storage, dtype in _STORAGE_DTYPES.items():
        found["torch", storage] = _Global(f"torch.{storage}", _no_call, dtype)
    found["torch.storage", "UntypedStorage"] = _Global("torch.storage.UntypedStorage", _no_call, "uint8")
    return found


def _no_call(*_: Any) -> Any:
    raise _RefusedError("its pickle calls a storage class")


def _operation_table() -> dict[int, Callable[[_Machine], None]]:
    def push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
        return lambda machine: machine.stack.append(make(machine))

    def put(layout: struct.Struct) -> Callable[[_Machine], None]:
        return lambda machine: machine.memo.__setitem__(machine.number(layout), machine.stack[-1])

    def get(layout: struct.Struct) -> Callable[[_Machine], None]:
        return lambda machine: machine.stack.append(machine.memo[machine.number(layout)])

    table: dict[bytes, Callable[[_Machine], None]] = {
        pickle.PROTO: _Machine.proto,
        pickle.MARK: _Machine.mark,
        pickle.NONE: push(lambda _: None),
        pickle.NEWTRUE: push(lambda _: True),
        pickle.NEWFALSE: push(lambda _: False),
        pickle.BININT: push(lambda machine: machine.number(_INT32)),
        pickle.BININT1: push(lambda machine: machine.number(_UINT8)),
        pickle.BININT2: push(lambda machine: machine.number(_UINT16)),
        pickle.LONG1: _Machine.long1,
        pickle.BINFLOAT: push(lambda machine: machine.number(_FLOAT64)),
        pickle.BINUNICODE: _Machine.text,
        pickle.SHORT_BINSTRING: _Machine.short_text,
        pickle.EMPTY_TUPLE: push(lambda _: ()),
        pickle.TUPLE: _Machine.tuple_from_mark,
        pickle.TUPLE1: lambda machine: machine.tuple_of(1),
        pickle.TUPLE2: lambda machine: machine.tuple_of(2),
        pickle.TUPLE3: lambda machine: machine.tuple_of(3),
        pickle.EMPTY_LIST: push(lambda _: []),
        pickle.APPEND: _Machine.append,
        pickle.APPENDS: _Machine.appends,
        pickle.EMPTY_DICT: push(lambda _: {}),
        pickle.SETITEM: _Machine.set_item,
        pickle.SETITEMS: _Machine.set_items,
        pickle.GLOBAL: _Machine.global_,
        pickle.REDUCE: _Machine.reduce,
        pickle.BUILD: _Machine.build,
        pickle.BINPERSID: _Machine.persistent,
        pickle.BINPUT: put(_UINT8),
        pickle.LONG_BINPUT: put(_UINT32),
        pickle.BINGET: get(_UINT8),
        pickle.LONG_BINGET: get(_UINT32),
    }
    return {code[0]: operation for code, operation in table.items()}


_UINT8, _UINT16, _UINT32, _INT32 = map(struct.Struct, ("<B", "<H", "<I", "<i"))
_FLOAT64 = struct.Struct(">d")
_STOP = pickle.STOP[0]
_GLOBALS = _resolve()
_OPERATIONS = _operation_table()
