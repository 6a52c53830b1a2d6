"""What aggregation writes, a part at a time: broadcast, state and model, each group as one object, each object once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from math import prod
from typing import Literal, NamedTuple

import torch
from blake3 import blake3
from pydantic import JsonValue
from torch import Tensor

from fedflow.errors import FedflowError
from fedflow.store.objects import ObjectRef, ObjectStore
from fedflow.store.records import Manifest
from fedflow.store.tensors import Part, Rows, TensorReader, header, read_spec
from fedflow.store.writing import Stream
from fedflow.tensors import ModelDigest, raw_bytes
from fedflow.types import Tensors, TensorSpec, canonical_json

__all__ = ["Layout", "LayoutChanged", "Made", "Output", "Written", "learned", "remembered", "write"]


class Output(NamedTuple):
    """A group of the broadcast or of the model, a field of the state, or the sum of a group of the updates."""

    kind: Literal["broadcast", "state", "model", "sum"]
    name: str


@dataclass(frozen=True)
class Made:
    """What one part of the names became.

    old:     what it was before, by output
    outputs: with their tensors in the order of the part
    scalars: the state's other fields, by "class.field"
    """

    old: Callable[[Output], Tensors]
    outputs: Mapping[Output, Tensors]
    scalars: Mapping[str, JsonValue]


@dataclass(frozen=True)
class Layout:
    """What an output consists of, known before its first byte is written. same_as: an earlier output that is the same object."""

    spec: Mapping[str, TensorSpec]
    same_as: Output | None = None


class LayoutChanged(FedflowError):
    """An output is not laid out as it was assumed to be."""


# -- layouts -----------------------------------------------------------------------------------------------------------
def remembered(store: ObjectStore, parent: Manifest, names: Iterable[str]) -> dict[Output, Layout]:
    """The layouts of `parent`, tensors in the order of `names`: what mostly stays as it is from round to round."""
    order = {name: at for at, name in enumerate(names)}
    found: dict[Output, Layout] = {}
    firsts: dict[ObjectRef, Output] = {}
    for output, ref in _refs(parent).items():
        spec = found[firsts[ref]].spec if ref in firsts else read_spec(store, ref)
        ordered = {name: spec[name] for name in sorted(spec, key=lambda name: order.get(name, -1))}
        found[output] = Layout(ordered, firsts.get(ref))
        firsts.setdefault(ref, output)
    return found


def _refs(manifest: Manifest) -> dict[Output, ObjectRef]:
    kinds = {"broadcast": manifest.broadcast, "state": manifest.state.tensors, "model": manifest.model}
    found = {Output(kind, name): ref for kind, refs in kinds.items() for name, ref in refs.items()}  # type: ignore[arg-type]
    return {output: found[output] for output in sorted(found, key=_place)}


def learned(parts: Iterable[tuple[Part, Made]]) -> dict[Output, Layout]:
    """The layouts of what is made, found by making it."""
    specs: dict[Output, dict[str, TensorSpec]] = {}
    differ: set[tuple[Output, Output]] = set()
    for part, made in parts:
        for output, tensors in made.outputs.items():
            spec = specs.setdefault(output, {})
            for name, tensor in tensors.items():
                spec[name] = _extended(name, spec.get(name), tensor, part[name])
        differ |= {(a, b) for a, b in permutations(made.outputs, 2) if not _identical(made.outputs[a], made.outputs[b])}
    found: dict[Output, Layout] = {}
    for output in sorted(specs, key=_place):
        firsts = (o for o, layout in found.items() if layout.same_as is None)
        same = (o for o in firsts if (o, output) not in differ and found[o].spec == specs[output])
        found[output] = Layout(specs[output], next(same, None))
    return found


def _place(output: Output) -> tuple[int, str]:
    """Who comes first is written; what is the same object after it is named only. Sites see the broadcast's objects alone."""
    return ("broadcast", "state", "model", "sum").index(output.kind), output.name


def _identical(tensors: Tensors, others: Tensors) -> bool:
    return tensors.keys() == others.keys() and all(tensor is others[name] for name, tensor in tensors.items())


def _extended(name: str, spec: TensorSpec | None, tensor: Tensor, rows: Rows) -> TensorSpec:
    """The spec of rows that are known already and those of `tensor` below them."""
    if spec is None:
        return TensorSpec(tuple(tensor.shape), tensor.dtype)
    if rows is None:
        raise FedflowError(f"{name}: found it made of two parts of the names, expected one; make no names of your own")
    if not spec.shape or spec.shape[1:] != tensor.shape[1:]:
        raise FedflowError(
            f"{name}: found {spec} and {TensorSpec(tuple(tensor.shape), tensor.dtype)} made of its rows, expected rows that fit "
            "together; say `by_rows = False` where whole tensors are needed"
        )
    return TensorSpec((spec.shape[0] + len(tensor), *spec.shape[1:]), spec.dtype)


# -- writing -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Written:
    """Where the outputs are."""

    refs: Mapping[Output, ObjectRef]
    layouts: Mapping[Output, Layout]
    scalars: Mapping[str, JsonValue]
    model_digest: str

    def of(self, kind: str) -> dict[str, ObjectRef]:
        """Name -> object."""
        return {output.name: ref for output, ref in self.refs.items() if output.kind == kind}

    def spec(self, kind: str) -> dict[str, Mapping[str, TensorSpec]]:
        """Name -> names, shapes and dtypes."""
        return {output.name: layout.spec for output, layout in self.layouts.items() if output.kind == kind}


def write(
    store: ObjectStore,
    layouts: Mapping[Output, Layout],
    parts: Iterable[tuple[Part, Made]],
    *,
    parent: Manifest | None,
    prefixes: Mapping[str, str],
    origin: str,
) -> Written:
    """Write every part as it comes. An output that did not change stays the object of `parent`, if any, that it was.

    prefixes: kind -> where its objects lie; origin: digest of all that determines what is written, from which objects get
    their names. Raises LayoutChanged where something else is made than `layouts` say; then nothing of it is there.
    """
    before = _refs(parent) if parent else {}
    objects = {
        output: _Object(store, output, layout.spec, before.get(output), _key(prefixes, origin, output))
        for output, layout in layouts.items()
        if layout.same_as is None
    }
    digest = ModelDigest()
    scalars: Mapping[str, JsonValue] | None = None
    try:
        for part, made in parts:
            _check(layouts, part, made)
            scalars = _agreed(scalars, made)
            for output, sink in objects.items():
                sink.add(part, made.outputs.get(output, {}), made.old)
            for output, tensors in made.outputs.items():
                if output.kind == "model":
                    for name, tensor in tensors.items():
                        digest.add(name, tensor, more=not _is_last(part, name, layouts[output].spec[name]))
        refs = {output: sink.close() for output, sink in objects.items()}
    except BaseException:
        for sink in objects.values():
            sink.abandon()
        raise
    found = {output: refs[layout.same_as or output] for output, layout in layouts.items()}
    return Written(found, layouts, scalars or {}, digest.result())


def _key(prefixes: Mapping[str, str], origin: str, output: Output) -> str:
    name = blake3(canonical_json([origin, *output])).hexdigest()
    return f"{prefixes[output.kind]}/{name}.safetensors"


def _is_last(part: Part, name: str, spec: TensorSpec) -> bool:
    rows = part.get(name)
    return rows is None or rows[1] == spec.shape[0]


def _check(layouts: Mapping[Output, Layout], part: Part, made: Made) -> None:
    """Raises LayoutChanged."""
    for output in {**layouts, **made.outputs}:
        tensors, layout = made.outputs.get(output, {}), layouts.get(output)
        expected = {} if layout is None else {n: _rows_of(layout.spec[n], part[n]) for n in part if n in layout.spec}
        found = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        if layout is None or found != expected:
            raise LayoutChanged(f"{output}: found {found}, expected {expected}")
        if layout.same_as and not _identical(tensors, made.outputs.get(layout.same_as, {})):
            raise LayoutChanged(f"{output}: found other tensors than in {layout.same_as}")


def _rows_of(spec: TensorSpec, rows: Rows) -> TensorSpec:
    return spec if rows is None else TensorSpec((rows[1] - rows[0], *spec.shape[1:]), spec.dtype)


def _agreed(before: Mapping[str, JsonValue] | None, made: Made) -> Mapping[str, JsonValue]:
    """The scalars, which every part must make the same. Raises FedflowError where it does not."""
    for name, value in made.scalars.items():
        if before is not None and before[name] != value:
            raise FedflowError(
                f"{name}: found {before[name]!r} and {value!r} from two parts of the names, expected one value; "
                "compute scalars from the context, not from the part"
            )
    return made.scalars


@dataclass
class _Object:
    """One object that is being written, from the first part on that differs from what was there.

    old: what it was before
    """

    store: ObjectStore
    output: Output
    spec: Mapping[str, TensorSpec]
    old: ObjectRef | None
    key: str
    _unchanged: list[Part] = field(default_factory=list)
    _stream: Stream | None = None

    def __post_init__(self) -> None:
        self._names, self._row = deque(self.spec), 0  # what comes next

    def _pass(self, name: str, rows: Rows) -> None:
        """Raises FedflowError unless this is what comes next in the layout: else bytes would lie under other names."""
        first, last = (0, None) if rows is None else rows
        if not self._names or (name, first) != (self._names[0], self._row):
            expected = f"{self._names[0]} from row {self._row} on" if self._names else "nothing more"
            raise FedflowError(
                f"{self.output.kind} {self.output.name}: found {name} from row {first} on, expected {expected}; make no names of "
                "your own, or say `partitionable = False`"
            )
        whole = last is None or last == self.spec[name].shape[0]
        self._row = 0 if whole or last is None else last
        if whole:
            self._names.popleft()

    def add(self, part: Part, tensors: Tensors, old: Callable[[Output], Tensors]) -> None:
        """Append `tensors`, of that part."""
        for name in tensors:
            self._pass(name, part[name])
        if self._stream is None and self.old is not None and _equal(tensors, old(self.output)):
            self._unchanged.append({name: part[name] for name in tensors})
            return
        if self._stream is None and (tensors or self.old is None):
            self._begin()
        self._push(tensors)

    def _begin(self) -> None:
        """The header, and what did not change so far."""
        head = header(self.spec)
        size = len(head) + sum(prod(spec.shape) * spec.dtype.itemsize for spec in self.spec.values())
        self._stream = Stream(self.store, self.key, size)
        self._stream.push(head)
        if self.old is not None and self._unchanged:
            reader = TensorReader(self.store, self.old)
            for part in self._unchanged:
                found = reader.read(part)
                self._push({name: found[name] for name in part})
            reader.finish()

    def _push(self, tensors: Tensors) -> None:
        for name in tensors:
            assert self._stream is not None
            self._stream.push(raw_bytes(tensors[name]))

    def close(self) -> ObjectRef:
        """The object, whole."""
        if self._stream is None and self.old is not None and read_spec(self.store, self.old) == self.spec:
            return self.old
        if self._stream is None:
            self._begin()
        assert self._stream is not None
        return self._stream.close()

    def abandon(self) -> None:
        """Leave nothing."""
        if self._stream is not None:
            self._stream.abandon()


def _equal(tensors: Tensors, others: Tensors) -> bool:
    """Whether names, shapes, dtypes and bytes are the same."""
    return tensors.keys() == others.keys() and all(_same_bytes(t, others[name]) for name, t in tensors.items())


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return not a.numel() or torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )
