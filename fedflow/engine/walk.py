"""Walking over all tensors in bounded memory: a part of the names at a time, several parts at once, results in order.

A part is so small that everything which is done with it fits into the budget; tensors that are too large are split by
rows. No bit depends on the parts, on how many are in work at once, or on who is done first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from threading import Condition
from typing import TypeVar

import torch

from fedflow.store.tensors import Part, file_order
from fedflow.types import Spec, TensorSpec

__all__ = ["SEGMENT", "Line", "Size", "in_order", "one_thread", "parts_of", "segments_of", "sizes_of"]

T = TypeVar("T")

SEGMENT = 1 << 18
"""Elements that are measured together: figures are summed over segments, which depend on nothing but a tensor's shape."""

_TIMES = 8
"""How much memory a part takes while it is reduced, in multiples of its bytes in the state and in one update: float64 sums
and temporaries, what is being read and what is being written."""


# -- parts -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Size:
    """What one name costs. rows: how many it can be split into; 1: it cannot."""

    bytes: int
    elements: int
    rows: int


def sizes_of(state: Spec, updates: Sequence[Spec], *, kept: int = 1, by_rows: bool = True) -> dict[str, Size]:
    """Every name in state and updates with its size, in the order in which their objects are read.

    kept:    updates that are in memory at once
    by_rows: whether a tensor may be split; only where it has one shape everywhere
    """
    groups: dict[str, dict[str, TensorSpec]] = {}
    for update in updates:
        for group, names in update.items():
            groups[group] = {**names, **groups.get(group, {})}
    places = [*state.values(), *groups.values()]
    rank = {id(place): {name: at for at, name in enumerate(file_order(place))} for place in places}

    def order(name: str) -> tuple[int, ...]:
        first = next(i for i, place in enumerate(places) if name in place)
        return first, rank[id(places[first])][name]

    found = {}
    for name in sorted({name for place in places for name in place}, key=order):
        in_state = [place[name] for place in state.values() if name in place]
        in_update = [place[name] for place in groups.values() if name in place]
        shapes = {spec.shape for spec in (*in_state, *in_update)}
        whole = not by_rows or len(shapes) > 1 or () in shapes
        found[name] = Size(
            bytes=sum(map(_bytes, in_state)) + kept * sum(map(_bytes, in_update)),
            elements=max(prod(shape) for shape in shapes),
            rows=1 if whole else max(1, next(iter(shapes))[0]),
        )
    return found


def _bytes(spec: TensorSpec) -> int:
    return prod(spec.shape) * spec.dtype.itemsize


def parts_of(sizes: Mapping[str, Size], budget: int) -> list[Part]:
    """All names in parts that take at most `budget` bytes of memory each, or else are a single row or tensor."""
    most = max(budget // _TIMES, 1)
    return list(_packed(((name, rows, _share(sizes[name], rows)) for name, rows in _pieces(sizes, most)), most))


def segments_of(sizes: Mapping[str, Size], budget: int) -> list[Part]:
    """The same in pieces that do not depend on the budget, of at most `SEGMENT` elements where a tensor can be split."""
    pieces = []
    for name, size in sizes.items():
        step = max(1, SEGMENT * size.rows // max(size.elements, 1))
        pieces += [(name, rows, _share(size, rows)) for rows in _split(size, step)]
    return list(_packed(pieces, max(budget // _TIMES, 1)))


def _pieces(sizes: Mapping[str, Size], most: int) -> Iterator[tuple[str, tuple[int, int] | None]]:
    for name, size in sizes.items():
        step = size.rows if size.bytes <= most else max(1, most * size.rows // size.bytes)
        yield from ((name, rows) for rows in _split(size, step))


def _split(size: Size, step: int) -> Iterator[tuple[int, int] | None]:
    if step >= size.rows:
        yield None
    else:
        yield from ((first, min(first + step, size.rows)) for first in range(0, size.rows, step))


def _share(size: Size, rows: tuple[int, int] | None) -> int:
    return size.bytes if rows is None else size.bytes * (rows[1] - rows[0]) // size.rows


def _packed(pieces: Iterable[tuple[str, tuple[int, int] | None, int]], most: int) -> Iterator[Part]:
    """Pieces that follow each other, together as long as there is room; a name at most once in a part."""
    part: dict[str, tuple[int, int] | None] = {}
    filled, empty = 0, True
    for name, rows, size in pieces:
        if part and (filled + size > most or name in part):
            yield part
            part, filled, empty = {}, 0, False
        part[name] = rows
        filled += size
    if part or empty:  # a payload of scalars alone is one part without names
        yield part


# -- several at once ---------------------------------------------------------------------------------------------------
class Cancelled(Exception):
    """Another part failed."""


class Line:
    """Where parts must pass one behind the other: an object that is read from front to back."""

    def __init__(self) -> None:
        self._changed, self._next, self._closed = Condition(), 0, False

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """Wait until all before `number` have passed. Raises Cancelled where one of them never will."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._next >= number)
            if self._closed:
                raise Cancelled
        try:
            yield
        finally:
            with self._changed:
                self._next = number + 1
                self._changed.notify_all()

    def close(self) -> None:
        """Let nobody pass any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def in_order(
    work: Callable[[int, Part], T], parts: Sequence[Part], lines: Iterable[Line], workers: int
) -> Iterator[tuple[Part, T]]:
    """Each part with `work(number, part)`, in order; `workers` of them at a time.

    `work` takes its turn at every one of `lines`. If one fails its error is raised, and nothing is left running.
    """
    if workers == 1 or len(parts) == 1:
        with one_thread():
            yield from ((part, work(number, part)) for number, part in enumerate(parts))
        return
    lines, failures = list(lines), list[BaseException]()

    def guarded(number: int, part: Part) -> T:
        try:
            return work(number, part)
        except BaseException as error:
            if not isinstance(error, Cancelled):
                failures.append(error)
            for line in lines:
                line.close()
            raise

    with one_thread(), ThreadPoolExecutor(workers, "part") as pool:
        waiting: deque[tuple[Part, Future[T]]] = deque()
        try:
            for number, part in enumerate(parts):
                if len(waiting) == workers:
                    yield _result(*waiting.popleft(), failures)
                waiting.append((part, pool.submit(guarded, number, part)))
            while waiting:
                yield _result(*waiting.popleft(), failures)
        finally:
            for line in lines:
                line.close()
            for _, future in waiting:
                future.cancel()


def _result(part: Part, future: Future[T], failures: list[BaseException]) -> tuple[Part, T]:
    try:
        return part, future.result()
    except Cancelled:
        raise failures[0] from None


@contextmanager
def one_thread() -> Iterator[None]:
    """torch's own threads would get in each other's way, and stand still when another process has their processor."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
