"""Tensors in the store: one group of tensors is one safetensors object, named by its content.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of the header; the header, JSON with
dtype, shape and place of every tensor; the tensors' bytes, one after the other without gaps. What is written here is byte
for byte what `safetensors.torch.save` makes; it is written and read a tensor, or a part of one, at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from blake3 import blake3
from torch import Tensor

from fedflow.errors import FedflowError, ObjectCorrupt
from fedflow.memory import fresh
from fedflow.store.backends import Data
from fedflow.store.objects import CHUNK_SIZE, ObjectRef, ObjectStore, object_of
from fedflow.store.reading import Reader
from fedflow.tensors import Stored, raw_bytes
from fedflow.types import Tensors, TensorSpec, spec_of

__all__ = [
    "Part",
    "Rows",
    "StoredTensors",
    "TensorReader",
    "file_order",
    "header",
    "read_spec",
    "read_tensors",
    "write_tensors",
]

_DTYPES: dict[str, torch.dtype] = {  # in the order in which the library writes them
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
    "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
    _DTYPES = dict(sorted({**_DTYPES, "F8_E8M0": torch.float8_e8m0fnu}.items(), key=lambda i: i[0] == "BOOL"))
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}
_MAX_HEADER = 100_000_000  # bytes; the library's own limit
_MOST_HEADERS = 64 << 10  # bytes that hold the header of most models
_MOST_DIMENSIONS = 64  # torch's own limit
_METADATA = "__metadata__"

Rows = tuple[int, int] | None
"""Rows a … b (exclusive) of a tensor; None: all of it, whatever its shape."""
Part = Mapping[str, Rows]
"""Which tensors, and which of their rows."""


# -- writing -----------------------------------------------------------------------------------------------------------
def file_order(spec: Mapping[str, TensorSpec]) -> list[str]:
    """The names as the library orders them: the widest dtypes first, so that every tensor is aligned; then by name."""
    return sorted(spec, key=lambda name: (_RANK.get(spec[name].dtype, -1), name.encode()))


def header(spec: Mapping[str, TensorSpec]) -> bytes:
    """The beginning of a file whose tensors follow in the order of `spec`. Raises FedflowError where one cannot be in it."""
    entries, at = {}, 0
    for name, (shape, dtype) in ((name, (s.shape, s.dtype)) for name, s in spec.items()):
        if name == _METADATA or dtype not in _NAMES:
            expected = f"one of {', '.join(_NAMES.values())}, and another name than {_METADATA}"
            raise FedflowError(f"{name}: found a tensor of {dtype}, expected {expected}; convert it, or rename it")
        end = at + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(store: ObjectStore | None, prefix: str, tensors: Tensors, *, heal: bool = False) -> ObjectRef:
    """Write `tensors` as one object below `prefix`. The same tensors give the same bytes, and are written once.

    Memory holds at most one more tensor: one that is not contiguous, or not in the processor's memory.
    store: None: nothing is written, and what is returned says what would be; heal: and once more where they are damaged
    """
    spec = spec_of({"": tensors})[""]
    names = file_order(spec)
    head = header({name: spec[name] for name in names})

    def parts() -> Iterator[Data]:
        yield head
        yield from (raw_bytes(tensors[name]) for name in names)

    if store is None:
        return object_of(prefix, parts(), ".safetensors")
    return store.write_parts(prefix, parts, ".safetensors", heal=heal)


# -- reading -----------------------------------------------------------------------------------------------------------
class _Entry(NamedTuple):
    spec: TensorSpec
    start: int  # bytes from the beginning of the file
    end: int


class TensorReader:
    """The tensors of one object, read a part at a time, each byte once if the parts come in the order of the file.

    The header is verified when this returns; other bytes only when `finish` has returned.
    Raises ObjectCorrupt where the object is not what `ref` says or not safetensors.
    """

    def __init__(self, store: ObjectStore, ref: ObjectRef) -> None:
        self.ref = ref
        self._header = _read_header(store, ref)
        self._reader = Reader(store, ref)

    @property
    def spec(self) -> Mapping[str, TensorSpec]:
        """Names, shapes and dtypes, in the order of the file."""
        return self._header.spec

    def read(self, part: Part) -> dict[str, Tensor]:
        """Those tensors of `part` that are there, or those rows of them, in the order of the file; each has its own memory."""
        entries = self._header.entries
        names = sorted((name for name in part if name in entries), key=lambda name: entries[name][1:])
        wanted = [(name, self._place(name, part[name])) for name in names]
        found = {name: fresh(spec.shape, spec.dtype) for name, (spec, _, _) in wanted}
        for run in _runs([(start, end, raw_bytes(found[name])) for name, (_, start, end) in wanted]):
            self._reader.read_into(run[0][0], [buffer for _, _, buffer in run])
        return found

    def _place(self, name: str, rows: Rows) -> _Entry:
        entry = self._header.entries[name]
        if rows is None:
            return entry
        shape, dtype = entry.spec.shape, entry.spec.dtype
        first, last = rows
        if not shape or not 0 <= first <= last <= shape[0]:
            raise ValueError(f"{name}: found rows {first} to {last}, expected some of {entry.spec}")
        row = prod(shape[1:]) * dtype.itemsize
        return _Entry(
            TensorSpec((last - first, *shape[1:]), dtype), entry.start + first * row, entry.start + last * row
        )

    def finish(self) -> None:
        """Verify what was read and is not verified yet. Raises ObjectCorrupt."""
        self._reader.finish()


def _runs(ranges: Iterable[tuple[int, int, memoryview]]) -> Iterator[list[tuple[int, int, memoryview]]]:
    """Those that lie one behind the other, together; empty ones left out."""
    run: list[tuple[int, int, memoryview]] = []
    for start, end, buffer in ranges:
        if start == end:
            continue
        if run and run[-1][1] != start:
            yield run
            run = []
        run.append((start, end, buffer))
    if run:
        yield run


def read_tensors(store: ObjectStore, ref: ObjectRef, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of `ref`, in name order; with `names` only those among them, reading little else.

    Every byte of them is verified. Raises ObjectCorrupt where the object is not what `ref` says or not safetensors.
    """
    if ref.size <= CHUNK_SIZE and not ref.chunks:
        found = _read_small(store, ref, names)
    else:
        reader = TensorReader(store, ref)
        found = reader.read(dict.fromkeys(reader.spec if names is None else names))
        reader.finish()
    return {name: found[name] for name in sorted(found)}


def _read_small(store: ObjectStore, ref: ObjectRef, names: Iterable[str] | None) -> dict[str, Tensor]:
    """The same of an object of one chunk, read at once: else it would be read for the header, and again for the rest."""
    whole = memoryview(store.read(ref))
    entries = _header_of(ref, lambda start, end: bytes(whole[start:end])).entries
    wanted = entries.keys() if names is None else entries.keys() & set(names)
    found = {name: torch.empty(entries[name].spec.shape, dtype=entries[name].spec.dtype) for name in wanted}
    for name, tensor in found.items():
        raw_bytes(tensor)[:] = whole[entries[name].start : entries[name].end]
    return found


class StoredTensors(Stored):
    """The tensors of one object, each read and verified when it is asked for, and not kept; in the order of the file.

    Memory: a chunk of the object, and what the caller keeps. Raises as `TensorReader` does, when it is made and when it reads.
    """

    def __init__(self, store: ObjectStore, ref: ObjectRef) -> None:
        self._store, self._ref, self._header = store, ref, _read_header(store, ref)
        self._step = ref.chunk_size if ref.chunks else max(ref.size, 1)
        self._chunk: tuple[int, bytes] = (-1, b"")

    @property
    def spec(self) -> Mapping[str, TensorSpec]:
        """Names, shapes and dtypes, in the order of the file."""
        return self._header.spec

    def __iter__(self) -> Iterator[str]:
        return iter(self._header.entries)

    def __len__(self) -> int:
        return len(self._header.entries)

    def __contains__(self, name: object) -> bool:
        return name in self._header.entries

    def __getitem__(self, name: str) -> Tensor:
        spec, at, end = self._header.entries[name]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        rest = raw_bytes(tensor)
        while at < end:
            piece = memoryview(self._verified(at // self._step))[at % self._step :][: end - at]
            rest[: len(piece)] = piece
            rest, at = rest[len(piece) :], at + len(piece)
        return tensor

    def read_into(self, own: Tensors) -> None:
        """Fill `own`, straight where a tensor's memory allows; verified when this returns."""
        reader = Reader(self._store, self._ref)
        for name, (spec, start, _) in self._header.entries.items():
            tensor = own[name]
            direct = tensor.is_contiguous() and not tensor.is_conj() and tensor.device.type == "cpu"
            read = tensor if direct else torch.empty(spec.shape, dtype=spec.dtype)
            reader.read_into(start, [raw_bytes(read)])
            if not direct:
                tensor.copy_(read)
        reader.verify()

    def _verified(self, number: int) -> bytes:
        if self._chunk[0] != number:
            self._chunk = (-1, b"")  # else there would be two for a moment
            start = number * self._step
            self._chunk = number, self._store.read(self._ref, start, min(self._ref.size, start + self._step))
        return self._chunk[1]


def read_spec(store: ObjectStore, ref: ObjectRef, *, largest_header: int = _MAX_HEADER) -> Mapping[str, TensorSpec]:
    """Names, shapes and dtypes in `ref`, in the order of the file, from its header alone.

    largest_header: bytes; parsing takes a multiple of it. Raises ObjectCorrupt.
    """
    return _read_header(store, ref, largest_header).spec


class _Header:
    """Where the tensors are, in the order of the file."""

    def __init__(self, entries: Mapping[str, _Entry]) -> None:
        self.entries = entries
        self.spec = {name: entry.spec for name, entry in entries.items()}


_HEADERS: WeakValueDictionary[tuple[str, int], _Header] = WeakValueDictionary()
"""By their bytes and the file's size, as long as anybody needs them: the updates of all sites mostly have one."""


def _read_header(store: ObjectStore, ref: ObjectRef, largest: int = _MAX_HEADER) -> _Header:
    return _header_of(ref, lambda start, end: store.read(ref, start, end), largest)


def _header_of(ref: ObjectRef, read: Callable[[int, int], bytes], largest: int = _MAX_HEADER) -> _Header:
    """What the header says; believed only as far as the file's size allows it."""
    if ref.size < 8:
        raise ObjectCorrupt(f"{ref.key}: found {ref.size} bytes, expected a safetensors file of at least 8")
    first = min(ref.size, max(8, min(ref.chunk_size, _MOST_HEADERS)))
    begin = read(0, first)  # one read where it can be: each reads and hashes a chunk
    length, most = int.from_bytes(begin[:8], "little"), min(largest, ref.size - 8)
    if length > most:
        raise ObjectCorrupt(f"{ref.key}: found a header of {length} bytes, expected at most {most}")
    text = begin[8 : 8 + length] if 8 + length <= len(begin) else read(8, 8 + length)
    key = blake3(text).hexdigest(), ref.size
    found = _HEADERS.get(key)
    if found is None:
        try:
            found = _HEADERS[key] = _Header(_parsed(text, ref.size))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = ascii(str(error))[1:-1][:500]  # it quotes what somebody else wrote
            raise ObjectCorrupt(f"{ref.key}: found a header that is not safetensors: {why}") from error
    return found


def _parsed(text: bytes, size: int) -> dict[str, _Entry]:
    if not text.startswith(b"{"):
        raise ValueError(f"it begins with {text[:1]!r}, expected {{")
    entries = json.loads(text.decode(), object_pairs_hook=_unique)
    found = {name: _entry(entry, 8 + len(text)) for name, entry in entries.items() if name != _METADATA}
    ordered = dict(sorted(found.items(), key=lambda item: item[1][1:]))
    _check_gapless(list(ordered.values()), 8 + len(text), size)
    return ordered


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"found {len(pairs)} keys of which only {len(found)} differ, expected each once")
    return found


def _entry(entry: Mapping[str, Any], base: int) -> _Entry:
    if len(entry["shape"]) > _MOST_DIMENSIONS:
        raise ValueError(f"found {len(entry['shape'])} dimensions, expected at most {_MOST_DIMENSIONS}")
    spec = TensorSpec(tuple(map(_count, entry["shape"])), _DTYPES[entry["dtype"]])
    start, end = map(_count, entry["data_offsets"])
    if end - start != prod(spec.shape) * spec.dtype.itemsize:
        raise ValueError(f"offsets {start} to {end} for {spec}")
    return _Entry(spec, base + start, base + end)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"found {str(value)[:100]}, expected a count")
    return value


def _check_gapless(entries: list[_Entry], base: int, size: int) -> None:
    """Every byte belongs to exactly one tensor."""
    for before, after in pairwise(entries):
        if after.start != before.end:
            raise ValueError(
                f"a tensor begins at {after.start - base}, where the one before ends at {before.end - base}"
            )
    first, last = (entries[0].start, entries[-1].end) if entries else (base, base)
    if first != base or last != size:
        raise ValueError(f"tensors from {first - base} to {last - base}, with {size - base} bytes of data")
