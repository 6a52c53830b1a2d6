"""All updates of a phase and the state before it, reduced to the state after it: a part of the names at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal, get_args

import torch
from pydantic import JsonValue
from torch import Tensor

from fedflow.algorithm import Algorithm, Averager, Partial
from fedflow.engine import outputs
from fedflow.engine.outputs import Layout, LayoutChanged, Made, Output, Written
from fedflow.engine.updates import Contributor
from fedflow.engine.walk import Line, Size, in_order, parts_of, segments_of, sizes_of
from fedflow.store.journal import Journal
from fedflow.store.records import Manifest, Reduced
from fedflow.store.state import StateReader, scalars_of, tensor_fields
from fedflow.store.tensors import Part, TensorReader
from fedflow.types import Groups, RoundContext, Spec, Tensors, TensorSpec, Update, canonical_json

__all__ = ["PartialReduction", "Reduction", "RegionalSum"]


@dataclass(frozen=True)
class RegionalSum:
    """Updates that were summed up elsewhere, read a part at a time."""

    journal: Journal
    record: Reduced
    updates: Sequence[tuple[Update, float]]

    @cached_property
    def _readers(self) -> dict[str, TensorReader]:
        return {group: TensorReader(self.journal.store, ref) for group, ref in self.record.sums.items()}

    @property
    def spec(self) -> Spec:
        """Groups, names and shapes of the sums."""
        return {group: reader.spec for group, reader in self._readers.items()}

    def load(self, part: Part) -> Partial:
        """The sums of those tensors, or rows of them."""
        sums = {group: reader.read(part) for group, reader in self._readers.items()}
        return Partial(sums, self.record.weights, self.updates)

    def finish(self) -> None:
        """Verify what was read and is not verified yet. Raises ObjectCorrupt."""
        for reader in self._readers.values():
            reader.finish()


@dataclass(frozen=True)
class Reduction:
    """What `updates`, and behind them `sums`, make of the state of `head`, in at most about `budget` bytes of memory and `threads`
    threads."""

    journal: Journal
    algorithm: Algorithm
    head: Manifest
    updates: Sequence[Contributor]
    context: RoundContext
    budget: int
    threads: int
    sums: Sequence[RegionalSum] = ()

    @property
    def _sources(self) -> list[Contributor | RegionalSum]:
        return [*self.updates, *self.sums]

    @cached_property
    def _state(self) -> StateReader:
        return StateReader(self.journal.store, self.algorithm.State, self.head.state)

    @cached_property
    def _sizes(self) -> dict[str, Size]:
        kept = len(self.updates) if self.algorithm.gathers else 1
        specs = [source.spec for source in self._sources]
        return sizes_of(self._state.spec, specs, kept=kept, by_rows=self.algorithm.by_rows)

    def _divided(self, divide: Any) -> list[Part]:
        """The parts; one where the algorithm cannot be partitioned, or where everything fits."""
        if not self.algorithm.partitionable:
            return [dict.fromkeys(self._sizes)]
        parts: list[Part] = divide(self._sizes, self.budget)
        return parts if len(parts) == 1 else divide(self._sizes, self.budget // self.threads)

    # -- the passes
    def write(self, prefixes: Mapping[str, str], closing: str) -> Written:
        """Write what is made, each object once, and verify every byte that was read.

        prefixes: kind of output -> where it lies; closing: digest of what is reduced, from which objects get their names
        """
        run = _Run(self, replace(self.context, measured=self._measured()), self._divided(parts_of))

        def written(layouts: Mapping[Output, Layout], parts: Iterable[tuple[Part, Made]]) -> Written:
            origin = canonical_json([self.head.digest(), closing]).decode()
            parent = self._parent
            return outputs.write(self.journal.store, layouts, parts, parent=parent, prefixes=prefixes, origin=origin)

        if len(run.parts) == 1:
            made = list(run.made())
            return written(outputs.learned(made), made)
        try:
            with contextlib.closing(run.made()) as parts:
                return written(self._expected(), parts)
        except LayoutChanged:  # as in the first step of an optimizer, whose moments were not there before
            layouts = outputs.learned(run.made())
        with contextlib.closing(run.made()) as parts:
            return written(layouts, parts)

    @property
    def _parent(self) -> Manifest | None:
        """The commit whose objects stay where nothing changes."""
        return self.head

    def _expected(self) -> dict[Output, Layout]:
        """How what is made is laid out, most likely."""
        return outputs.remembered(self.journal.store, self.head, self._sizes)

    def old(self, part: Part) -> Any:
        """That part of the state."""
        return self._state.read(part)

    def finish(self) -> None:
        """Verify what was read and is not verified yet."""
        for source in self._sources:
            source.finish()
        self._state.finish()

    def make(
        self, part: Part, old: Any, updates: Iterator[Update], sums: Iterator[Partial], context: RoundContext
    ) -> Made:
        """The part of the new state. old: that of the state before"""
        algorithm, phase = self.algorithm, following(self.algorithm, context.phase)
        aggregate = (
            algorithm.aggregate(updates, context) if not self.sums else _summed(algorithm, updates, sums).aggregate()
        )
        _exhaust(updates)
        new = algorithm.server_update(old, aggregate, context)
        made = {
            Output(kind, name): _ordered(tensors, part)
            for kind in _KINDS
            for name, tensors in _outputs(algorithm, kind, new, phase).items()
        }
        scalars = {f"{type(new).__name__}.{name}": value for name, value in scalars_of(new).items()}
        before = cache(lambda kind: _outputs(algorithm, kind, old, context.phase))
        return Made(lambda output: before(output.kind).get(output.name, {}), made, scalars)

    def _measured(self) -> Tensors:
        """Σ over all parts of what `algorithm.measure` finds, in their order."""
        if not self.algorithm.measures:
            return {}
        total: dict[str, Tensor] = {}
        run = _Run(self, self.context, self._divided(segments_of))
        for _, found in run.measured():
            for name, value in found.items():
                total[name] = total[name] + value if name in total else value
        return total

    def scalars(self, written: Written) -> dict[str, JsonValue]:
        """The new state's fields that are no tensors."""
        return {name.rpartition(".")[2]: value for name, value in written.scalars.items()}


@dataclass(frozen=True)
class PartialReduction(Reduction):
    """Σ wᵢ·tᵢ over `updates`, in float64, for an aggregation elsewhere. weights: group -> name -> Σ wᵢ, of what was made"""

    weights: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def _decodes(self) -> bool:
        return type(self.algorithm).decode is not Algorithm.decode

    @cached_property
    def _sizes(self) -> dict[str, Size]:
        state = self._state.spec if self._decodes else {}
        return sizes_of(state, [update.spec for update in self.updates], by_rows=self.algorithm.by_rows)

    @property
    def _parent(self) -> None:
        return None

    def _expected(self) -> dict[Output, Layout]:
        found: dict[Output, Layout] = {}
        for update in self.updates:
            for group, names in update.spec.items():
                spec = found.setdefault(Output("sum", group), Layout({})).spec
                found[Output("sum", group)] = Layout({**spec, **names})
        return {output: Layout(self._wide(layout.spec)) for output, layout in found.items()}

    def _wide(self, spec: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        return {name: TensorSpec(spec[name].shape, torch.float64) for name in self._sizes if name in spec}

    def _measured(self) -> Tensors:
        return {}

    def old(self, part: Part) -> Any:
        return super().old(part) if self._decodes else None

    def make(
        self, part: Part, old: Any, updates: Iterator[Update], sums: Iterator[Partial], context: RoundContext
    ) -> Made:
        partial = _summed(self.algorithm, updates, sums).partial()
        for group, weights in partial.weights.items():
            self.weights.setdefault(group, {}).update(weights)
        made = {Output("sum", group): _ordered(tensors, part) for group, tensors in partial.sums.items()}
        return Made(lambda output: {}, made, {})


def _summed(algorithm: Algorithm, updates: Iterable[Update], sums: Iterable[Partial]) -> Averager:
    averager = Averager()
    for update in updates:
        averager.add(update, algorithm.weight(update))
    for partial in sums:
        averager.add_partial(partial)
    return averager


@dataclass(frozen=True)
class _Run:
    """One pass over the parts."""

    of: Reduction
    context: RoundContext
    parts: Sequence[Part]
    _lines: dict[int, Line] = field(default_factory=dict)

    def made(self) -> Generator[tuple[Part, Made], None, None]:
        for part, made in self._passed(self._make):
            extra = {name: None for tensors in made.outputs.values() for name in tensors if name not in part}
            yield {**part, **extra}, made
        self._finish()

    def measured(self) -> Generator[tuple[Part, Tensors], None, None]:
        yield from self._passed(self._measure)
        self._finish()

    def _passed(self, work: Any) -> Iterator[tuple[Part, Any]]:
        """An object is read from front to back: each has a line in which parts wait for their turn."""
        self._lines.clear()
        self._lines.update({i: Line() for i in range(len(self.of.updates) + len(self.of.sums) + 1)})
        return in_order(work, self.parts, self._lines.values(), self.of.threads)

    def _finish(self) -> None:
        self.of.finish()

    def _old(self, number: int, part: Part) -> Any:
        with self._lines[0].turn(number):
            return self.of.old(part)

    def _loaded(self, number: int, part: Part, state: Any) -> Iterator[Update]:
        for i, update in enumerate(self.of.updates, start=1):
            with self._lines[i].turn(number):
                loaded = update.load(part)
            yield self.of.algorithm.decode(loaded, state, self.context.phase)

    def _sums(self, number: int, part: Part) -> Iterator[Partial]:
        for i, region in enumerate(self.of.sums, start=len(self.of.updates) + 1):
            with self._lines[i].turn(number):
                loaded = region.load(part)
            yield loaded

    def _measure(self, number: int, part: Part) -> Tensors:
        updates = self._loaded(number, part, self._old(number, part))
        found = self.of.algorithm.measure(updates, self.context)
        _exhaust(updates)
        return found

    def _make(self, number: int, part: Part) -> Made:
        old = self._old(number, part)
        return self.of.make(part, old, self._loaded(number, part, old), self._sums(number, part), self.context)


_Kind = Literal["broadcast", "state", "model"]
_KINDS: tuple[_Kind, ...] = get_args(_Kind)


def _outputs(algorithm: Algorithm, kind: _Kind, state: Any, phase: str) -> Groups:
    """What is written of `state` for the sites in `phase`, for the server, for people."""
    if kind == "broadcast":
        return algorithm.broadcast(state, phase)
    return tensor_fields(state) if kind == "state" else algorithm.model(state)


def following(algorithm: Algorithm, phase: str) -> str:
    """The phase after `phase`, be it of the next round."""
    return algorithm.phases[(algorithm.phases.index(phase) + 1) % len(algorithm.phases)]


def _exhaust(updates: Iterator[Update]) -> None:
    """Whoever is waiting behind this part is to have its turn, whatever the algorithm did with it."""
    for _ in updates:
        pass


def _ordered(tensors: Tensors, part: Part) -> Mapping[str, Tensor]:
    """In the order of the part, then what is in none."""
    known = {name: tensors[name] for name in part if name in tensors}
    return {**known, **{name: tensors[name] for name in sorted(tensors.keys() - known.keys())}}
