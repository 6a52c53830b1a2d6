"""Objects (bytes) under one root URL: created once, seen whole or not at all, verified when read.

    store = ObjectStore("s3://bucket/fedflow")
    store.put("public/r1/run.json", b"{}")           # create-only: a second put raises ObjectExists
    ref = store.write("public/r1/objects", data)     # named by its content; ref.to_json() goes into a manifest
    store.read(ref, 0, 100)                          # verified against ref, else ObjectCorrupt

Backends: the local file system, `memory://`, S3, GCS and Azure through obstore, anything else through fsspec if
`probe` finds that its creation is exclusive. docs/store-backends.md has the choice, its figures and its limits.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from itertools import chain, groupby
from typing import Any, Literal, Self
from uuid import uuid4

from blake3 import blake3

from fedflow.errors import (
    FedflowError,
    KeyEscapesRoot,
    ObjectCorrupt,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreUnwritable,
)
from fedflow.store.backends import RESERVED, Backend, Blocks, Buffers, Data, Ranges, connect, key_problem

__all__ = ["CHUNK_SIZE", "ObjectRef", "ObjectStore", "digest", "object_of"]

CHUNK_SIZE = 16 << 20  # bytes that are hashed, and so verified, together
_SMALL = 8 << 20  # bytes of an object that is sent at once, not in parts
_DEAD = timedelta(days=1)
_PROBES = f"{RESERVED}probe"
_DIGEST = re.compile(r"blake3:[0-9a-f]{64}")


# --- references ------------------------------------------------------------------------------------------------------


def digest(data: Data) -> str:
    """`blake3:<64 hex digits>` of the bytes, as `b3sum` prints it."""
    return f"blake3:{blake3(data).hexdigest()}"


@dataclass(frozen=True)
class ObjectRef:
    """What a manifest keeps of an object, so that whoever reads it knows that it got the same bytes.

    An object of at most one chunk has no chunk digests: its own says it all. That of a larger one is the digest of its chunks'
    digests, so that no byte is hashed twice.

        ref = store.write("objects", data, ".safetensors")
        ObjectRef.from_json(json.loads(json.dumps(ref.to_json()))) == ref
    """

    key: str
    size: int  # bytes
    digest: str  # of the whole object, or of `chunks`
    chunk_size: int = CHUNK_SIZE  # bytes; the last chunk may be shorter
    chunks: tuple[str, ...] = ()  # digest of each chunk, in order

    def __post_init__(self) -> None:
        if problem := key_problem(self.key):
            raise KeyEscapesRoot(f"not a reference to an object: {problem}")
        if problem := _ref_problem(self):
            raise StoreError(f"not a reference to an object: {problem}")

    @classmethod
    def of(cls, key: str, data: Data, chunk_size: int = CHUNK_SIZE) -> Self:
        """The reference of `data` under `key`."""
        return cls(key, *_measure([data], chunk_size))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return asdict(self) | {"chunks": list(self.chunks)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`. Raises StoreError for anything else, however it is malformed."""
        names = [field.name for field in fields(cls)]
        if not isinstance(data, Mapping) or set(data) != set(names) or not isinstance(data["chunks"], list):
            expected = f"the fields {', '.join(names)}, the last one a list"
            raise StoreError(f"not a reference to an object: found {str(data)[:500]}, expected {expected}")
        return cls(**{**data, "chunks": tuple(data["chunks"])})


def _ref_problem(ref: ObjectRef) -> str | None:
    if type(ref.size) is not int or type(ref.chunk_size) is not int or ref.size < 0 or ref.chunk_size < 1:
        return f"sizes must be whole numbers of bytes, found {ref.size!r} and {ref.chunk_size!r}"
    for found in (ref.digest, *ref.chunks):
        if not isinstance(found, str) or not _DIGEST.fullmatch(found):
            return f"expected a digest such as {digest(b'')}, found {found!r}"
    expected = -(-ref.size // ref.chunk_size) if ref.size > ref.chunk_size else 0
    if len(ref.chunks) != expected:
        return f"expected {expected} chunk digests for {ref.size} bytes, found {len(ref.chunks)}"
    if ref.chunks and ref.digest != (of_chunks := _digest_of(ref.chunks)):
        return f"expected the digest {of_chunks} of these chunk digests, found {ref.digest}"
    return None


def _digest_of(chunks: Sequence[str]) -> str:
    """Of an object with these chunks."""
    return chunks[0] if len(chunks) == 1 else digest(b"".join(bytes.fromhex(c.partition(":")[2]) for c in chunks))


class _Meter:
    """Passes parts on while it hashes them; remembers whether the source of the parts failed."""

    def __init__(self, parts: Iterable[Data], chunk_size: int) -> None:
        self._parts, self._chunk_size = iter(parts), chunk_size
        self._chunk, self._filled = blake3(), 0
        self._size, self._chunks = 0, list[str]()
        self.failure: BaseException | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Data:
        try:
            part = next(self._parts)
        except StopIteration:
            raise
        except BaseException as exc:
            self.failure = exc
            raise
        self._update(part)
        return part

    def _update(self, part: Data) -> None:
        rest = _flat(part)
        self._size += len(rest)
        while rest:
            head, rest = rest[: self._chunk_size - self._filled], rest[self._chunk_size - self._filled :]
            self._chunk.update(head)
            self._filled += len(head)
            if self._filled == self._chunk_size:
                self._close_chunk()

    def _close_chunk(self) -> None:
        self._chunks.append(f"blake3:{self._chunk.hexdigest()}")
        self._chunk, self._filled = blake3(), 0

    def result(self) -> tuple[int, str, int, tuple[str, ...]]:
        """Size, digest, chunk size, chunk digests of all that went through."""
        if self._filled or not self._chunks:
            self._close_chunk()
        chunks = tuple(self._chunks)
        return self._size, _digest_of(chunks), self._chunk_size, chunks if len(chunks) > 1 else ()


def _measure(parts: Iterable[Data], chunk_size: int) -> tuple[int, str, int, tuple[str, ...]]:
    meter = _Meter(parts, chunk_size)
    for _ in meter:
        pass
    return meter.result()


def object_of(prefix: str, parts: Iterable[Data], suffix: str = "", *, chunk_size: int = CHUNK_SIZE) -> ObjectRef:
    """What `ObjectStore.write` would call these bytes."""
    measured = _measure(parts, chunk_size)
    name = f"{measured[1].removeprefix('blake3:')}{suffix}"
    return ObjectRef(f"{prefix}/{name}" if prefix else name, *measured)


def _flat(data: Data) -> memoryview:
    view = memoryview(data)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


# --- the store -------------------------------------------------------------------------------------------------------


Telling = Callable[[str, int, str | None], None]
"""Is told key, bytes and digest of what is about to be written."""


class ObjectStore:
    """Objects under one root URL, create-only unless asked otherwise.

    A put is atomic: whoever reads sees all of the object or none of it, even if the writer is killed. A failed put has
    written nothing, or the whole object where the connection broke after the server had taken it. Safe to use from
    several threads. A store is not passed to another process: give that process the URL.

    url:     "/plain/path", "file:///path", "memory://name", "s3://bucket/prefix", "gs://...", "az://container/prefix",
             or any URL that fsspec knows. Without credentials: those are options, or in the environment.
    options: for s3, gs and az what `obstore.store.from_url` takes (`endpoint`, `access_key_id`, `client_options`,
             `retry_config`, ...; durations also as seconds); the usual AWS_*, GOOGLE_* and AZURE_* variables count too.
             For other protocols what fsspec takes.

    Every method raises StoreUnavailable where a retry may help (after the retries of its own, about a minute for a
    server that is down), StoreUnwritable where it won't, KeyEscapesRoot for a key that is no plain relative path.
    """

    url: str
    """The root in its canonical form."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self.url, self._backend = connect(os.fspath(url), dict(options or {}))
        self._tell: Telling | None = None

    @classmethod
    def _of(cls, url: str, backend: Backend, tell: Telling | None) -> Self:
        store = cls.__new__(cls)
        store.url, store._backend, store._tell = url, backend, tell
        return store

    def telling(self, tell: Telling) -> ObjectStore:
        """The same store, which calls `tell(key, bytes, digest)` before it sends anything; what that raises stops it.

        Of what is sent while it is made, digest is None and bytes are what they are about: it is told again when all is sent.
        """
        return self._of(self.url, self._backend, tell)

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    def __reduce__(self) -> str:
        raise TypeError("an ObjectStore holds a connection and credentials: give the other process its URL")

    def child(self, prefix: str) -> ObjectStore:
        """The store of all keys below `prefix`, over the same connection. Its keys cannot lead out of it."""
        return self._of(f"{self.url}/{self._checked(prefix)}", self._backend.at(prefix), self._tell)

    def patient(self, limit: timedelta) -> ObjectStore:
        """The same store, which gives up a transfer after `limit` without a byte, and repeats requests that fail for as long.

        S3, GCS and Azure only: elsewhere the operating system or the backend decides.
        """
        return self._of(self.url, self._backend.patient(limit), self._tell)

    def put(self, key: str, data: Data, *, mode: Literal["create", "overwrite"] = "create") -> None:
        """Store `data` under `key`: whole, durable and visible to all when this returns.

        create:    raises ObjectExists if the key is taken, and leaves it; of racing writers exactly one wins
        overwrite: replaces what is there; of racing writers the last one stays
        """
        if mode not in ("create", "overwrite"):
            raise ValueError(f"mode: found {mode!r}, expected 'create' or 'overwrite'")
        write = self._backend.create if mode == "create" else self._backend.overwrite
        if self._tell is not None:
            self._tell(key, len(_flat(data)), digest(data))
        with self._errors(mode, self._checked(key)):
            write(key, _flat(data))

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        """All bytes of the object, unverified. Raises ObjectMissing, and ObjectCorrupt where there are more than `at_most`."""
        with self._errors("read", self._checked(key)):
            if at_most is None:
                return self._backend.get(key)
            data, size = self._backend.get_sized(key, 0, at_most)
        if size > at_most:
            raise ObjectCorrupt(f"{self.url}: found {size} bytes in {key!r}, expected at most {at_most}")
        return data

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes start..end (exclusive) of the object, all of them, unverified. Raises ObjectMissing, ObjectCorrupt."""
        return self.get_ranges(key, [(start, end)])[0]

    def get_ranges(self, key: str, ranges: Ranges) -> Blocks:
        """Several ranges at once, neighbours in one request; each is whole. Raises ObjectMissing, ObjectCorrupt."""
        for start, end in ranges:
            _check_range(key, start, end)
        wanted = [(start, end) for start, end in ranges if start < end]
        with self._errors("read", self._checked(key)):
            found = iter(self._backend.get_ranges(key, wanted) if wanted else ())
        parts = [next(found) if start < end else b"" for start, end in ranges]
        for (start, end), part in zip(ranges, parts, strict=True):
            if len(part) != end - start:
                raise self._corrupt(key, f"bytes {start} to {end}", f"{len(part)} bytes from {start} on")
        return parts

    def size(self, key: str) -> int:
        """Bytes of the object. Raises ObjectMissing."""
        with self._errors("look up", self._checked(key)):
            return self._backend.size(key)

    def exists(self, key: str) -> bool:
        """Whether an object is there; a server that does not answer raises, it is no False."""
        try:
            self.size(key)
        except ObjectMissing:
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        """Keys below `prefix`/ at any depth, sorted; never half-written objects. A missing prefix has no keys."""
        if prefix:
            self._checked(prefix)
        with self._errors("list", prefix):
            return sorted(key for key in self._backend.find(prefix) if key_problem(key) is None)

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens if there is none."""
        with self._errors("delete", self._checked(key)), suppress(FileNotFoundError):
            self._backend.delete(key)

    def write(
        self, prefix: str, data: Data, suffix: str = "", *, chunk_size: int = CHUNK_SIZE, heal: bool = False
    ) -> ObjectRef:
        """Store `data` as `prefix`/<digest><suffix>. Idempotent: an object of that name and size is not sent again.

        heal: unless it is damaged, for which it is read
        """
        return self.write_parts(prefix, lambda: [data], suffix, chunk_size=chunk_size, heal=heal)

    def write_parts(
        self,
        prefix: str,
        parts: Callable[[], Iterable[Data]],
        suffix: str = "",
        *,
        chunk_size: int = CHUNK_SIZE,
        heal: bool = False,
    ) -> ObjectRef:
        """The same of parts that are made anew to be measured and to be sent: memory holds a few of them, not the object."""
        ref = object_of(prefix, parts(), suffix, chunk_size=chunk_size)
        try:
            there = self.size(ref.key) == ref.size and (not heal or self._is_whole(ref))
        except (ObjectMissing, ObjectCorrupt):
            there = False
        if there:
            return ref
        if self.write_stream(ref.key, parts(), chunk_size=chunk_size, size=ref.size, digest=ref.digest) != ref:
            raise self._corrupt(ref.key, ref.digest, "other bytes when they were sent than when they were measured")
        return ref

    def _is_whole(self, ref: ObjectRef) -> bool:
        """True; reads a chunk at a time. Raises ObjectCorrupt."""
        for start in range(0, ref.size, ref.chunk_size):
            self.read(ref, start, min(ref.size, start + ref.chunk_size))
        return True

    def write_stream(
        self,
        key: str,
        parts: Iterable[Data],
        *,
        chunk_size: int = CHUNK_SIZE,
        size: int = 0,
        digest: str | None = None,
    ) -> ObjectRef:
        """Store the parts, one after the other, as one object; memory holds a few parts, not the object.

        For objects whose name determines their content: an object that is there is replaced, and nobody is told. If `parts` raises, its
        error passes through and nothing is written. (Backends other than local and cloud join the parts in memory.)

        size: bytes of all parts, about, where it may be more than the 78 GiB that S3 takes in requests of 8 MiB
        digest: theirs, where it is known before
        """
        if self._tell is not None:
            self._tell(key, size, digest)
        meter = _Meter(parts, chunk_size)
        try:
            with self._errors("overwrite", self._checked(key)):
                first = list(_until(_SMALL, meter))
                if sum(map(len, first)) < _SMALL:
                    self._backend.overwrite(key, memoryview(b"".join(first)))
                else:
                    self._backend.stream(key, chain(first, meter), size)
        except Exception:
            if meter.failure is not None:
                raise meter.failure from None
            raise
        ref = ObjectRef(key, *meter.result())
        if self._tell is not None and digest is None:
            self._tell(key, ref.size, ref.digest)
        return ref

    def read(self, ref: ObjectRef, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes start..end (exclusive; default: all), verified. Raises ObjectMissing, or ObjectCorrupt.

        Size and digest must be those of `ref`. A part costs the chunks that it touches, and only those are verified. No
        more than `ref.size` bytes are read, whatever is there.
        """
        start, end = start or 0, ref.size if end is None else end
        if ref.size:
            return self.read_ranges(ref, [(start, end)])[0]
        self.verify(ref, 0, digest(self._read_sized(ref, 0, 0)))
        return b""

    def read_ranges(self, ref: ObjectRef, ranges: Ranges) -> Blocks:
        """The same for several parts, reading a chunk that several of them touch only once."""
        for start, end in ranges:
            _check_range(ref.key, start, end)
            if end > ref.size:
                raise ValueError(f"{ref.key}: found the range {start} to {end}, expected one within {ref.size} bytes")
        step, blocks = ref.chunk_size if ref.chunks else ref.size, [b""] * len(ranges)
        touched = {chunk for start, end in ranges if start < end for chunk in range(start // step, -(-end // step))}
        for chunks in _runs(touched):
            first, last = chunks[0] * step, min(ref.size, (chunks[-1] + 1) * step)
            data = self._read_sized(ref, first, last)
            self._verify_chunks(ref, chunks, step, data)
            for number, (start, end) in enumerate(ranges):
                if first <= start < end <= last:
                    blocks[number] = data[start - first : end - first]
        return blocks

    def fill(self, ref: ObjectRef, start: int, buffers: Buffers) -> Iterator[memoryview]:
        """Fill `buffers` with the object's bytes from `start` on, unverified: each piece as soon as it is there.

        Raises ObjectMissing, or ObjectCorrupt where the object has another size than `ref`. For `fedflow.store.reading`.
        """
        left = sum(map(len, buffers))
        with self._errors("read", self._checked(ref.key)):
            for view, size in self._backend.fill(ref.key, start, buffers):
                if size != ref.size:
                    raise self._corrupt(ref.key, f"{ref.size} bytes ({ref.digest})", f"{size} bytes")
                left -= len(view)
                yield view
        if left:
            raise self._corrupt(ref.key, f"{ref.size} bytes ({ref.digest})", f"{left} fewer of them")

    def verify(self, ref: ObjectRef, chunk: int, found: str) -> None:
        """Raises ObjectCorrupt unless chunk number `chunk` of `ref` has the digest `found`."""
        expected = ref.chunks or (ref.digest,)
        if found != expected[chunk]:
            raise self._corrupt(ref.key, f"{expected[chunk]} in chunk {chunk} of {len(expected)}", found)

    def _read_sized(self, ref: ObjectRef, start: int, end: int) -> bytes:
        with self._errors("read", self._checked(ref.key)):
            data, size = self._backend.get_sized(ref.key, start, end)
        if size != ref.size:
            raise self._corrupt(ref.key, f"{ref.size} bytes ({ref.digest})", f"{size} bytes")
        return data

    def _verify_chunks(self, ref: ObjectRef, chunks: Sequence[int], step: int, data: bytes) -> None:
        view = memoryview(data)
        for offset, chunk in enumerate(chunks):
            self.verify(ref, chunk, digest(view[offset * step : (offset + 1) * step]))

    def _corrupt(self, key: str, expected: str, found: str) -> ObjectCorrupt:
        fix = "the object was changed or damaged after it was written: restore it, or delete it and write it again"
        return ObjectCorrupt(f"{self.url}: object {key!r} is corrupt: expected {expected}, found {found}; {fix}")

    def sweep(self, age: timedelta = _DEAD) -> None:
        """Remove what dead writers left where only the store sees it: temporary files (local), unfinished uploads (S3).

        age: since the last write, after which a writer is taken for dead
        """
        with self._errors("sweep", ""):
            self._backend.sweep(age)

    def probe(self) -> None:
        """Try, on objects of its own, what a run relies on; raises a StoreError that says what the store lacks.

        Write access, reading back, create-only that holds against a second writer and in a race (whose losers must
        see the winner's object whole at once), listing, deletion. On a local file system it removes the temporary
        files that killed writers left more than a day ago.
        """
        key = f"{_PROBES}/{uuid4().hex}"
        try:
            self._probe_write(key)
            for lap in range(self._backend.probe_races):
                self._probe_race(f"{key}-{lap}")
            self.sweep()
        except StoreError as exc:
            raise type(exc)(f"{exc} (seen while probing {self.url} before use: create, read, list, delete)") from None
        finally:
            with suppress(StoreError):
                self._probe_clean(key)

    def _probe_write(self, key: str) -> None:
        self._probe_create(key, b"first")
        if self._probe_create(key, b"second"):
            raise StoreError(self._not_exclusive("a second create of the same key succeeded"))
        with self._errors("read", key):
            found, keys = self._backend.get(key), set(self._backend.find(_PROBES))
        if found != b"first" or key not in keys:
            raise StoreError(
                f"{self.url}: wrote b'first' as {key!r}, then read {found!r} and listed {sorted(keys)}; expected what"
                " was written: use a store that reads its own writes"
            )
        with self._errors("delete", key):
            self._backend.delete(key)

    def _probe_race(self, key: str) -> None:
        payloads = [bytes([number]) * (64 << 10) for number in range(self._backend.probe_writers)]
        start = threading.Barrier(len(payloads))

        def contend(payload: bytes) -> tuple[bool, bytes]:
            start.wait()
            won = self._probe_create(key, payload)
            with self._errors("read", key):
                return won, self._backend.get(key)

        with ThreadPoolExecutor(len(payloads)) as pool:
            results = list(pool.map(contend, payloads))
        winners = [payload for payload, (won, _) in zip(payloads, results, strict=True) if won]
        if len(winners) != 1:
            raise StoreError(self._not_exclusive(f"{len(winners)} of {len(payloads)} racing creates succeeded"))
        if any(seen != winners[0] for _, seen in results):
            raise StoreError(self._not_exclusive("a reader saw something else than the whole object of the winner"))

    def _probe_create(self, key: str, data: bytes) -> bool:
        try:
            with self._errors("create", key):
                self._backend.create(key, memoryview(data))
        except ObjectExists:
            return False
        return True

    def _not_exclusive(self, seen: str) -> str:
        return (
            f"{self.url}: {seen}; expected that exactly one create wins and everyone sees its object whole. Use a local"
            " or NFS directory, S3 (or a server that honours 'If-None-Match: *'), GCS or Azure"
        )

    def _probe_clean(self, key: str) -> None:
        with self._errors("delete", key):
            for left in [found for found in self._backend.find(_PROBES) if found.startswith(key)]:
                self._backend.delete(left)

    def _checked(self, key: str) -> str:
        problem = key_problem(key)
        if problem:
            raise KeyEscapesRoot(f"{self.url}: {problem}")
        return key

    @contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except FedflowError:
            raise
        except Exception as exc:
            what = f"{self.url}: cannot {action} {key if len(key) <= 500 else key[:500] + '…'!r}"
            known = self._backend.explain(exc, what)
            if known is None:
                raise
            if isinstance(known, ObjectMissing) and action in ("create", "overwrite", "list"):
                known = StoreUnwritable(f"{what}: found no such bucket or directory, expected it: create it")
            raise known from None  # the original may show credentials (a signed URL); `known` tells it without them


def _until(size: int, parts: Iterator[Data]) -> Iterator[memoryview]:
    """Parts until they are together as large as `size`, or all of them."""
    while size > 0 and (part := next(parts, None)) is not None:
        size -= len(flat := _flat(part))
        yield flat


def _runs(numbers: Iterable[int]) -> Iterator[Sequence[int]]:
    """Runs of consecutive numbers: {1, 2, 5} gives [1, 2], [5]."""
    for _, run in groupby(enumerate(sorted(numbers)), lambda item: item[1] - item[0]):
        yield [number for _, number in run]


def _check_range(key: str, start: int, end: int) -> None:
    if not 0 <= start <= end:
        raise ValueError(f"{key}: found the range {start} to {end}, expected 0 <= start <= end")
