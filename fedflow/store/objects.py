"""Objects (bytes) under one root URL: created once, seen whole or not at all, verified when read.

    store = ObjectStore("s3://bucket/fedflow")
    store.put("public/r1/run.json", b"{}")           # create-only: a second put raises ObjectExists
    ref = store.write("public/r1/objects", data)     # named by its content; ref.to_json() goes into a manifest
    store.read(ref, 0, 100)                          # verified against ref, else ObjectCorrupt

Backends: the local file system, `memory://`, S3, GCS and Azure through obstore, anything else through fsspec if
`probe` finds that its creation is exclusive. docs/store-backends.md has the choice, its figures and its limits.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import sys
import tempfile
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, Self
from urllib.parse import quote
from uuid import uuid4

import fsspec
from blake3 import blake3

from fedflow.errors import (
    FedflowError,
    KeyEscapesRoot,
    ObjectCorrupt,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreUnavailable,
    StoreUnwritable,
)

if TYPE_CHECKING:
    from obstore.store import ObjectStore as CloudStore

__all__ = ["CHUNK_SIZE", "ObjectRef", "ObjectStore", "digest"]

Data = bytes | memoryview
Blocks = list[bytes]
Ranges = Sequence[tuple[int, int]]  # start, end (exclusive), in bytes
Publish = Callable[[Path, Path], object]  # gives a temporary file its name

CHUNK_SIZE = 16 << 20  # bytes that are hashed, and so verified, together
_RESERVED = ".fedflow-"  # names that begin so are the store's own: temporary files, locks, probes
_TEMPORARY = f"{_RESERVED}tmp-"
_TEMPORARY_AGE = timedelta(days=1)  # without a write, after which the writer is taken for dead
_PROBES = f"{_RESERVED}probe"

_CLOUD = ("s3", "gs", "az", "abfs", "abfss")  # schemes that obstore serves
_CLIENT = {"connect_timeout": 10, "timeout": 120}  # seconds; the second for a whole request, with its up to 32 MiB
_RETRY = {"max_retries": 100, "retry_timeout": 60, "backoff": {"init_backoff": 0.1, "max_backoff": 10, "base": 3}}
_DOWNLOAD = 32 << 20  # bytes a request
_UPLOAD, _UPLOADS = 8 << 20, 4  # bytes a request, requests at once
_WRITER = "fedflowwriter"  # metadata of a created object; a name that Azure takes too

_DIGEST = re.compile(r"blake3:[0-9a-f]{64}")
_SECRET = re.compile(r"key|secret|token|passw|credential|(^|_)(sas|sig)", re.IGNORECASE)
_UNWRITABLE = {
    errno.EACCES: "permission",
    errno.EPERM: "permission",
    errno.EROFS: "a file system that is not read-only",
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space in the quota",
    errno.EFBIG: "that a file may be this large",
    errno.ENOTDIR: "no object of that name at a level above",
    errno.EISDIR: "no other objects below that name",
    errno.ENAMETOOLONG: "a shorter name",
    errno.ELOOP: "no circle of symbolic links",
}
_TRANSIENT = (
    *(errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.EMFILE, errno.ENFILE),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_MEMORY = threading.Lock()  # fsspec's memory file system checks first and writes then


# --- references ------------------------------------------------------------------------------------------------------


def digest(data: Data) -> str:
    """`blake3:<64 hex digits>` of the bytes, as `b3sum` prints it."""
    return f"blake3:{blake3(data).hexdigest()}"


@dataclass(frozen=True)
class ObjectRef:
    """What a manifest keeps of an object, so that whoever reads it knows that it got the same bytes.

    An object of at most one chunk has no chunk digests: its own says it all.

        ref = store.write("objects", data, ".safetensors")
        ObjectRef.from_json(json.loads(json.dumps(ref.to_json()))) == ref
    """

    key: str
    size: int  # bytes
    digest: str  # of the whole object
    chunk_size: int = CHUNK_SIZE  # bytes; the last chunk may be shorter
    chunks: tuple[str, ...] = ()  # digest of each chunk, in order

    def __post_init__(self) -> None:
        if problem := _key_problem(self.key):
            raise KeyEscapesRoot(f"not a reference to an object: {problem}")
        if problem := _ref_problem(self):
            raise StoreError(f"not a reference to an object: {problem}")

    @classmethod
    def of(cls, key: str, data: Data, chunk_size: int = CHUNK_SIZE) -> Self:
        """The reference of `data` under `key`."""
        return cls(key, *_measure(data, chunk_size))

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
    return None


class _Meter:
    """Passes parts on while it hashes them; remembers whether the source of the parts failed."""

    def __init__(self, parts: Iterable[Data], chunk_size: int) -> None:
        self._parts, self._chunk_size = iter(parts), chunk_size
        self._whole, self._chunk, self._filled = blake3(), blake3(), 0
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
        self._whole.update(rest)
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
        if self._filled:
            self._close_chunk()
        chunks = tuple(self._chunks) if self._size > self._chunk_size else ()
        return self._size, f"blake3:{self._whole.hexdigest()}", self._chunk_size, chunks


def _measure(data: Data, chunk_size: int) -> tuple[int, str, int, tuple[str, ...]]:
    meter = _Meter([data], chunk_size)
    for _ in meter:
        pass
    return meter.result()


def _flat(data: Data) -> memoryview:
    view = memoryview(data)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


# --- keys ------------------------------------------------------------------------------------------------------------


def _key_problem(key: str) -> str | None:
    """Why `key` is no relative POSIX path of plain names; None if it is one."""
    if not isinstance(key, str) or not key:
        return f"{key!r} is no key: expected a relative path such as 'rounds/00001/plan.json'"
    for segment in key.split("/"):
        if segment in ("", ".", ".."):
            return f"key {key!r} has the segment {segment!r}: expected plain names between single slashes"
        if segment.startswith(_RESERVED):
            return f"key {key!r} has the segment {segment!r}: names that begin with {_RESERVED!r} are the store's own"
    bad = next((char for char in key if char == "\\" or unicodedata.category(char) in ("Cc", "Cs")), None)
    return f"key {key!r} has the character {bad!r}: expected printable text without backslashes" if bad else None


# --- the store -------------------------------------------------------------------------------------------------------


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
        self.url, self._backend = _connect(os.fspath(url), dict(options or {}))

    @classmethod
    def _of(cls, url: str, backend: _Backend) -> Self:
        store = cls.__new__(cls)
        store.url, store._backend = url, backend
        return store

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    def __reduce__(self) -> str:
        raise TypeError("an ObjectStore holds a connection and credentials: give the other process its URL")

    def child(self, prefix: str) -> ObjectStore:
        """The store of all keys below `prefix`, over the same connection. Its keys cannot lead out of it."""
        return self._of(f"{self.url}/{self._checked(prefix)}", self._backend.at(prefix))

    def put(self, key: str, data: Data, *, mode: Literal["create", "overwrite"] = "create") -> None:
        """Store `data` under `key`: whole, durable and visible to all when this returns.

        create:    raises ObjectExists if the key is taken, and leaves it; of racing writers exactly one wins
        overwrite: replaces what is there; of racing writers the last one stays
        """
        if mode not in ("create", "overwrite"):
            raise ValueError(f"mode: found {mode!r}, expected 'create' or 'overwrite'")
        write = self._backend.create if mode == "create" else self._backend.overwrite
        with self._errors(mode, self._checked(key)):
            write(key, _flat(data))

    def get(self, key: str) -> bytes:
        """All bytes of the object, unverified. Raises ObjectMissing."""
        with self._errors("read", self._checked(key)):
            return self._backend.get(key)

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
            return sorted(key for key in self._backend.find(prefix) if _key_problem(key) is None)

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens if there is none."""
        with self._errors("delete", self._checked(key)), suppress(FileNotFoundError):
            self._backend.delete(key)

    def write(self, prefix: str, data: Data, suffix: str = "", *, chunk_size: int = CHUNK_SIZE) -> ObjectRef:
        """Store `data` as `prefix`/<digest><suffix>. Idempotent: an object of that name and size is not sent again."""
        measured = _measure(data, chunk_size)
        name = f"{measured[1].removeprefix('blake3:')}{suffix}"
        ref = ObjectRef(f"{prefix}/{name}" if prefix else name, *measured)
        try:
            there = self.size(ref.key) == ref.size
        except ObjectMissing:
            there = False
        if not there:
            self.put(ref.key, data, mode="overwrite")
        return ref

    def write_stream(self, key: str, parts: Iterable[Data], *, chunk_size: int = CHUNK_SIZE) -> ObjectRef:
        """Store the parts, one after the other, as one object; memory holds a few parts, not the object.

        For objects whose name determines their content: an object that is there is replaced. If `parts` raises, its
        error passes through and nothing is written. (Backends other than local and cloud join the parts in memory.)
        """
        meter = _Meter(parts, chunk_size)
        try:
            with self._errors("overwrite", self._checked(key)):
                self._backend.stream(key, meter)
        except Exception:
            if meter.failure is not None:
                raise meter.failure from None
            raise
        return ObjectRef(key, *meter.result())

    def read(self, ref: ObjectRef, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes start..end (exclusive; default: all), verified. Raises ObjectMissing, or ObjectCorrupt.

        Size and digest must be those of `ref`. A part costs the chunks that it touches, and only those are verified. No
        more than `ref.size` bytes are read, whatever is there.
        """
        start, end = start or 0, ref.size if end is None else end
        if (start, end) != (0, ref.size):
            return self.read_ranges(ref, [(start, end)])[0]
        data = self._read_sized(ref, 0, ref.size)
        self._verify(ref, "", ref.digest, data)
        return data

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

    def _read_sized(self, ref: ObjectRef, start: int, end: int) -> bytes:
        with self._errors("read", self._checked(ref.key)):
            data, size = self._backend.get_sized(ref.key, start, end)
        if size != ref.size:
            raise self._corrupt(ref.key, f"{ref.size} bytes ({ref.digest})", f"{size} bytes")
        return data

    def _verify_chunks(self, ref: ObjectRef, chunks: Sequence[int], step: int, data: bytes) -> None:
        expected, view = ref.chunks or (ref.digest,), memoryview(data)
        for offset, chunk in enumerate(chunks):
            where = f" in chunk {chunk} of {len(expected)}"
            self._verify(ref, where, expected[chunk], view[offset * step : (offset + 1) * step])

    def _verify(self, ref: ObjectRef, where: str, expected: str, data: Data) -> None:
        found = digest(data)
        if found != expected:
            raise self._corrupt(ref.key, expected + where, found)

    def _corrupt(self, key: str, expected: str, found: str) -> ObjectCorrupt:
        fix = "the object was changed or damaged after it was written: restore it, or delete it and write it again"
        return ObjectCorrupt(f"{self.url}: object {key!r} is corrupt: expected {expected}, found {found}; {fix}")

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
            with self._errors("sweep", key):
                self._backend.sweep()
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
        problem = _key_problem(key)
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
            what = f"{self.url}: cannot {action} {key!r}"
            known = self._backend.explain(exc, what)
            if known is None:
                raise
            if isinstance(known, ObjectMissing) and action in ("create", "overwrite", "list"):
                known = StoreUnwritable(f"{what}: found no such bucket or directory, expected it: create it")
            raise known from None  # the original may show credentials (a signed URL); `known` tells it without them


def _runs(numbers: Iterable[int]) -> Iterator[Sequence[int]]:
    """Runs of consecutive numbers: {1, 2, 5} gives [1, 2], [5]."""
    for _, run in groupby(enumerate(sorted(numbers)), lambda item: item[1] - item[0]):
        yield [number for _, number in run]


def _check_range(key: str, start: int, end: int) -> None:
    if not 0 <= start <= end:
        raise ValueError(f"{key}: found the range {start} to {end}, expected 0 <= start <= end")


# --- backends --------------------------------------------------------------------------------------------------------


class _Backend(Protocol):
    """What a kind of store does with checked keys. Raises its own exceptions; `explain` turns them into ours."""

    probe_races: int  # races that `probe` holds
    probe_writers: int  # in each of them

    def at(self, prefix: str) -> Self: ...
    def create(self, key: str, data: memoryview) -> None: ...  # exclusive
    def overwrite(self, key: str, data: memoryview) -> None: ...
    def stream(self, key: str, parts: Iterator[Data]) -> None: ...  # overwrites
    def get(self, key: str) -> bytes: ...
    def get_ranges(self, key: str, ranges: Ranges) -> Blocks: ...  # no range is empty; a block may be short at the end
    def get_sized(self, key: str, start: int, end: int) -> tuple[bytes, int]: ...  # the range, the size of the object
    def size(self, key: str) -> int: ...
    def find(self, prefix: str) -> Iterable[str]: ...
    def delete(self, key: str) -> None: ...  # FileNotFoundError is fine
    def sweep(self) -> None: ...
    def explain(self, exc: Exception, what: str) -> StoreError | None: ...  # None: no error of the store


def _connect(url: str, options: dict[str, Any]) -> tuple[str, _Backend]:
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme in ("file", "local"):
        return _connect_local(rest if separator else url, options)
    place = _without_login(scheme, rest).rstrip("/")
    shown = f"{scheme}://{place}"
    path = place.partition("/")[2]
    if path and (problem := _key_problem(path)):
        raise KeyEscapesRoot(f"{shown}: {problem}")
    if scheme == "memory" and not options:
        return shown, _Fsspec(fsspec.filesystem("memory"), f"/{place}", (), _MEMORY)
    if scheme == "memory":
        raise StoreError(f"{shown}: found the options {sorted(options)}, expected none for a store in memory")
    secrets = _secrets(options)
    if scheme not in _CLOUD:
        return shown, _Fsspec(*_open_fsspec(url, shown, options), secrets)
    if place != rest.rstrip("/"):
        raise StoreError(f"{shown}: found a login in the URL, expected credentials in the options or the environment")
    return shown, _Cloud(_open_cloud(shown, options, secrets), secrets)


# --- errors: what a message may show, and which of ours it is --------------------------------------------------------


def _without_login(scheme: str, rest: str) -> str:
    """`user:password@host/path` without the user; in abfs://container@account the part before @ is no user."""
    host, slash, path = rest.partition("/")
    return rest if scheme.startswith("abfs") else host.rpartition("@")[2] + slash + path


def _secrets(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Values that no message may show, from options (at any depth) and the environment; longest first."""
    clouds = ("AWS_", "AZURE_", "GOOGLE_")
    named = [*_leaves(options), *(item for item in os.environ.items() if item[0].startswith(clouds))]
    found = {str(value) for name, value in named if _SECRET.search(name) and len(str(value)) > 3}
    return tuple(sorted(found, key=len, reverse=True))


def _leaves(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield name, value


def _told(exc: Exception, secrets: Iterable[str] = ()) -> str:
    """The first line of the exception's text and the server's code, without logins, query strings and secrets."""
    code = re.search(r"<Code>\w+</Code>", str(exc))
    text = next(iter(str(exc).splitlines()), "").partition("<?xml")[0].rstrip(" :") or type(exc).__name__
    text = f"{text} ({code[0][6:-7]})" if code else text
    text = re.sub(r"(\w://)[^/@\s]+@", r"\1", text)
    text = re.sub(r"(\w://[^?\s]+)\?\S+", r"\1", text)
    for secret in secrets:
        text = text.replace(secret, "***")
    return text[:500]


def _explain_os_error(exc: OSError, what: str, secrets: Iterable[str] = ()) -> StoreError:
    told = f"{what}: {_told(exc, secrets)}"
    if isinstance(exc, FileExistsError):
        return _exists(what)
    if isinstance(exc, FileNotFoundError):
        return _missing(what)
    if exc.errno in _UNWRITABLE:
        return StoreUnwritable(f"{told}; expected {_UNWRITABLE[exc.errno]}")
    if exc.errno in _TRANSIENT or isinstance(exc, ConnectionError | TimeoutError):
        return StoreUnavailable(f"{told}; try again")
    return StoreError(told)


def _exists(what: str) -> ObjectExists:
    return ObjectExists(f"{what}: found an object there, expected none; it is unchanged")


def _missing(what: str) -> ObjectMissing:
    return ObjectMissing(f"{what}: found nothing there, expected an object")


# --- local file system -----------------------------------------------------------------------------------------------


def _connect_local(path: str, options: Mapping[str, Any]) -> tuple[str, _Backend]:
    if not path or "\0" in path:
        raise StoreError(f"found {path!r}, expected the path of a directory")
    root = os.path.realpath(path)
    if options:
        raise StoreError(f"file://{root}: found the options {sorted(options)}, expected none for a local store")
    return f"file://{root}", _Local(root)


class _Local:
    """Files below a directory; file and directory are on disk (fsync) when a put returns.

    Plain system calls: fsspec's LocalFileSystem reads through links out of the root, doesn't fsync, and its create looks
    first and writes then. Links that someone swaps during a call are not defended against.
    """

    probe_races, probe_writers = 2, 8

    def __init__(self, root: str, publish: Publish | None = None) -> None:
        self._root, self._prefix = root.rstrip("/"), ""
        self._publish = publish or publish_by_link
        self._durable = set[Path]()  # directories whose own names are known to be on disk

    def at(self, prefix: str) -> Self:
        clone = copy(self)
        clone._prefix = f"{self._prefix}{prefix}/"
        return clone

    def _path(self, key: str) -> Path:
        base = f"{self._root}/{self._prefix}"
        real = os.path.realpath(base + key)
        if not f"{real}/".startswith(base):
            raise KeyEscapesRoot(f"file://{base}: a symbolic link leads from key {key!r} to {real}, out of the root")
        return Path(base + key)

    def create(self, key: str, data: memoryview) -> None:
        self._put(key, [data], self._publish)

    def overwrite(self, key: str, data: memoryview) -> None:
        self._put(key, [data], Path.replace)

    def stream(self, key: str, parts: Iterator[Data]) -> None:
        self._put(key, parts, Path.replace)

    def _put(self, key: str, parts: Iterable[Data], publish: Publish) -> None:
        path = self._path(key)
        temporary = path.with_name(f"{_TEMPORARY}{uuid4().hex}")
        try:
            self._write_temporary(temporary, parts)
            publish(temporary, path)
        except FileExistsError:
            _fsync_directory(path.parent)  # the loser of a race relies on the winner's object
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) from None
            raise
        finally:
            with suppress(OSError):  # nothing to clean where nothing could be written
                temporary.unlink()
        _fsync_directory(path.parent)

    def _write_temporary(self, temporary: Path, parts: Iterable[Data]) -> None:
        with self._open_new(temporary) as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())

    def _open_new(self, path: Path) -> IO[bytes]:
        self._make_directory(path.parent)
        try:
            return path.open("xb")
        except FileNotFoundError:  # someone removed a directory that we knew
            self._durable.clear()
            self._make_directory(path.parent)
            return path.open("xb")

    def _make_directory(self, path: Path) -> None:
        """Create the directory and those above it, and wait until their names are on disk."""
        if path in self._durable or path == path.parent:
            return
        above = len(str(path)) <= len(self._root)
        if not (above and path.is_dir()):
            self._make_directory(path.parent)
            try:
                path.mkdir(exist_ok=True)
            except FileExistsError:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
            _fsync_directory(path.parent)
        self._durable.add(path)

    def get(self, key: str) -> bytes:
        with self._open(key) as file:
            return file.read()

    def get_ranges(self, key: str, ranges: Ranges) -> Blocks:
        with self._open(key) as file:
            return [_read_at(file, start, end) for start, end in ranges]

    def get_sized(self, key: str, start: int, end: int) -> tuple[bytes, int]:
        with self._open(key) as file:
            return _read_at(file, start, end), _size(file)

    @contextmanager
    def _open(self, key: str) -> Iterator[IO[bytes]]:
        with _directory_is_no_object(), self._path(key).open("rb") as file:
            yield file

    def size(self, key: str) -> int:
        path = self._path(key)
        with _directory_is_no_object():
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a file", str(path))
        return status.st_size

    def find(self, prefix: str) -> Iterable[str]:
        directory = self._path(prefix)
        skip = len(f"{self._root}/{self._prefix}")
        return (path[skip:] for path in _files(str(directory)))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with suppress(NotADirectoryError, IsADirectoryError):
            path.unlink()
            _fsync_directory(path.parent)

    def sweep(self) -> None:
        """Remove temporary files that nobody has written to for a day, by the clock of the file system itself."""
        base = self._path("")
        with tempfile.NamedTemporaryFile(prefix=_TEMPORARY, dir=base) as clock:
            oldest = os.fstat(clock.fileno()).st_mtime - _TEMPORARY_AGE.total_seconds()
        for directory, _, names in os.walk(base):
            for name in names:
                path = Path(directory, name)
                with suppress(OSError):  # another user's, or just gone
                    if name.startswith(_TEMPORARY) and path.lstat().st_mtime < oldest:
                        path.unlink()

    def explain(self, exc: Exception, what: str) -> StoreError | None:
        return _explain_os_error(exc, what) if isinstance(exc, OSError) else None


def publish_by_link(temporary: Path, path: Path) -> None:
    """Give the written file its name unless the name is taken (FileExistsError); atomic, over NFS too.

    A file system without hard links gets `publish_under_lock`.
    """
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        with suppress(FileNotFoundError):
            if path.samefile(temporary):  # NFS repeated a request whose answer was lost: the name is ours
                return
        raise
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        publish_under_lock(temporary, path)


def publish_under_lock(temporary: Path, path: Path) -> None:
    """The same by a lock in the directory, which the kernel releases if its holder dies.

    Exclusive between processes of one machine, and between machines only where the file system passes locks on.
    """
    with path.with_name(f"{_RESERVED}lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        temporary.rename(path)


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno != errno.EINVAL:  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _directory_is_no_object() -> Iterator[None]:
    try:
        yield
    except (IsADirectoryError, NotADirectoryError) as exc:
        raise FileNotFoundError(errno.ENOENT, "a directory, or below a file", exc.filename) from None


def _read_at(file: IO[bytes], start: int, end: int) -> bytes:
    end = min(end, _size(file))  # what a reference claims must not decide how much memory is taken
    file.seek(start)
    return file.read(end - start) if start < end else b""


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def _files(directory: str) -> Iterator[str]:
    """Paths of the regular files below; links are not followed."""
    try:
        entries = os.scandir(directory)
    except (FileNotFoundError, NotADirectoryError):  # missing, or removed meanwhile
        return
    with entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path)
            elif entry.is_file(follow_symlinks=False):
                yield entry.path


# --- S3, GCS, Azure --------------------------------------------------------------------------------------------------


def _open_cloud(url: str, options: dict[str, Any], secrets: tuple[str, ...]) -> CloudStore:
    try:
        from obstore.store import from_url
    except ImportError:
        raise StoreError(f"{url}: found no package obstore, expected it: pip install 'fedflow[s3]'") from None
    client = _CLIENT | {"allow_http": _plain_http(options)} | dict(options.pop("client_options", {}))
    retry = _RETRY | dict(options.pop("retry_config", {}))
    scheme, _, place = url.partition("://")
    try:
        return from_url(
            f"{scheme}://{quote(place, safe='/@:')}",  # from_url decodes; our URLs are literal
            client_options=_durations(client),
            retry_config=_durations(retry),
            **options,
        )
    except Exception as exc:
        told = _told(exc, secrets)
        raise StoreError(f"{url}: {told}; expected the options of obstore.store.from_url") from None


def _plain_http(options: Mapping[str, Any]) -> bool:
    """Whether the endpoint is an http:// one: who names it, means it."""
    named = [str(value) for name, value in options.items() if "endpoint" in name.lower()]
    named += [os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")]
    return any(value.startswith("http://") for value in named)


def _durations(config: Mapping[str, Any]) -> Any:
    """Numbers of seconds as timedeltas, which is what obstore takes and JSON has not."""

    def converted(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return _durations(value)
        seconds = type(value) in (int, float) and name.endswith(("timeout", "backoff"))
        return timedelta(seconds=value) if seconds else value

    return {name: converted(name, value) for name, value in config.items()}


class _Cloud:
    """Objects behind obstore. Requests are short (`_DOWNLOAD`, `_UPLOAD`), so that their timeout says something."""

    probe_races, probe_writers = 1, 4  # SeaweedFS makes the losers of a race wait for whole seconds

    def __init__(self, store: CloudStore, secrets: tuple[str, ...]) -> None:
        self._store, self._secrets, self._prefix = store, secrets, ""

    def at(self, prefix: str) -> Self:
        clone = copy(self)
        clone._prefix = f"{self._prefix}{prefix}/"
        return clone

    def create(self, key: str, data: memoryview) -> None:
        """A conditional put. The client repeats it if the answer is lost; `_WRITER` tells whose the object is."""
        obs, writer = _obstore(), uuid4().hex
        try:
            obs.put(self._store, self._prefix + key, data, mode="create", attributes={_WRITER: writer})
        except obs.exceptions.AlreadyExistsError:
            if self._writer(key) != writer:
                raise

    def _writer(self, key: str) -> str | None:
        with suppress(FileNotFoundError):  # deleted since
            found = _obstore().get(self._store, self._prefix + key, options={"head": True})
            return dict(found.attributes).get(_WRITER)
        return None

    def overwrite(self, key: str, data: memoryview) -> None:
        _obstore().put(self._store, self._prefix + key, data, chunk_size=_UPLOAD, max_concurrency=_UPLOADS)

    def stream(self, key: str, parts: Iterator[Data]) -> None:
        _obstore().put(self._store, self._prefix + key, parts, chunk_size=_UPLOAD, max_concurrency=_UPLOADS)

    def get(self, key: str) -> bytes:
        return self._download(key, 0, sys.maxsize)[0]

    def get_sized(self, key: str, start: int, end: int) -> tuple[bytes, int]:
        return self._download(key, start, end) if start < end else (b"", self.size(key))

    def _download(self, key: str, start: int, end: int) -> tuple[bytes, int]:
        """The bytes, as far as there are any, and the size; all from one version of the object."""
        obs, blocks, size = _obstore(), list[Any](), end
        options: dict[str, Any] = {}
        while start < min(end, size):
            options["range"] = (start, min(end, start + _DOWNLOAD))
            try:
                found = obs.get(self._store, self._prefix + key, options=options)
            except obs.exceptions.GenericError as exc:
                if _status(exc) == 416:  # begins behind the end
                    return b"", self.size(key)
                raise
            blocks.append(found.bytes())
            start, size = start + _DOWNLOAD, found.meta["size"]
            if found.meta["e_tag"]:
                options["if_match"] = found.meta["e_tag"]
        return b"".join(blocks), size

    def get_ranges(self, key: str, ranges: Ranges) -> Blocks:
        if len(ranges) == 1:
            return [self._download(key, *ranges[0])[0]]
        size = self.size(key)  # obstore's get_ranges panics at a range that begins behind the end
        if any(end > size for _, end in ranges):
            return [self._download(key, start, min(end, size))[0] for start, end in ranges]
        blocks: Blocks = []
        for batch in _batches(ranges):
            starts, ends = zip(*batch, strict=True)
            found = _obstore().get_ranges(self._store, self._prefix + key, starts=starts, ends=ends)
            blocks += [bytes(block) for block in found]
        return blocks

    def size(self, key: str) -> int:
        return int(_obstore().head(self._store, self._prefix + key)["size"])

    def find(self, prefix: str) -> Iterable[str]:
        for batch in _obstore().list(self._store, self._prefix + prefix, chunk_size=1000):
            for item in batch:
                yield item["path"].removeprefix(self._prefix)

    def delete(self, key: str) -> None:
        _obstore().delete(self._store, self._prefix + key)

    def sweep(self) -> None:
        """Nothing: an upload that was cut off is invisible, and the bucket's lifecycle rule removes its parts."""

    def explain(self, exc: Exception, what: str) -> StoreError | None:
        from obstore import exceptions as found

        if not isinstance(exc, found.BaseError | FileNotFoundError):
            return None
        told, status = f"{what}: {_told(exc, self._secrets)}", _status(exc)
        if isinstance(exc, found.AlreadyExistsError):
            return _exists(what)
        if isinstance(exc, FileNotFoundError):
            return _missing(what)
        if re.search(r"http://(169\.254\.169\.254|metadata\.google)", told):
            return StoreUnwritable(f"{told}; found no credentials, expected them in the options or the environment")
        if isinstance(exc, found.PermissionDeniedError | found.UnauthenticatedError):
            return StoreUnwritable(f"{told}; expected credentials that the store accepts for this")
        if isinstance(exc, found.PreconditionError):
            return StoreUnavailable(f"{told}; the object was replaced during the read: try again")
        if status == 416:
            return ObjectCorrupt(f"{told}; found the end of the object before the range, expected all of it")
        broken = status is None and "HTTP error" in told and "builder error" not in told
        if broken or (status or 0) >= 500 or status in (408, 429):
            return StoreUnavailable(f"{told}; try again")
        return StoreError(told)


_obstore_runs_in: int | None = None  # id of the process that has obstore's threads


def _obstore() -> Any:
    """The module; an error in a process forked from one that used it: without its threads calls would hang."""
    global _obstore_runs_in
    import obstore
    import obstore.exceptions

    if _obstore_runs_in not in (None, os.getpid()):
        raise StoreError(
            "this process was forked from one that had already used an s3, gs or az store, and obstore's threads do not"
            " survive a fork; expected a process started by 'spawn' or 'forkserver' (multiprocessing.get_context), or"
            " a parent that leaves such stores to its children"
        )
    _obstore_runs_in = os.getpid()
    return obstore


def _status(exc: Exception) -> int | None:
    found = re.search(r"status code: (\d{3})", str(exc))
    return int(found[1]) if found else None


def _batches(ranges: Ranges) -> Iterator[Ranges]:
    """Consecutive ranges, together at most `_DOWNLOAD` bytes, or a single one that is larger."""
    batch: list[tuple[int, int]] = []
    for start, end in ranges:
        if batch and sum(b - a for a, b in batch) + end - start > _DOWNLOAD:
            yield batch
            batch = []
        batch.append((start, end))
    yield batch


# --- memory, and whatever else fsspec has ----------------------------------------------------------------------------


def _open_fsspec(url: str, shown: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    try:
        fs, root = fsspec.core.url_to_fs(url, **options)
    except OSError as exc:
        raise _explain_os_error(exc, f"{shown}: cannot connect", _secrets(options)) from None
    except Exception as exc:
        told = _told(exc, _secrets(options))
        raise StoreError(f"{shown}: {told}; expected a URL and options that fsspec knows") from None
    return fs, root


class _Fsspec:
    """Objects behind `pipe_file(mode="create")`: exclusive under `lock`, else only if `probe` found it so."""

    def __init__(self, fs: Any, root: str, secrets: tuple[str, ...], lock: threading.Lock | None = None) -> None:
        self._fs, self._root, self._secrets = fs, root.rstrip("/"), secrets
        self._lock: AbstractContextManager[Any] = lock or nullcontext()
        self.probe_races, self.probe_writers = (2 if lock else 8), 8

    def at(self, prefix: str) -> Self:
        clone = copy(self)
        clone._root = f"{self._root}/{prefix}"
        return clone

    def create(self, key: str, data: memoryview) -> None:
        self._pipe(key, data, "create")

    def overwrite(self, key: str, data: memoryview) -> None:
        self._pipe(key, data, "overwrite")

    def stream(self, key: str, parts: Iterator[Data]) -> None:
        self._pipe(key, b"".join(parts), "overwrite")

    def _pipe(self, key: str, data: Data, mode: str) -> None:
        path = f"{self._root}/{key}"
        with self._lock:
            try:
                self._fs.pipe_file(path, bytes(data), mode=mode)
            except Exception as exc:  # each file system has its own for "is there"
                self._fs.invalidate_cache()
                if mode == "create" and self._fs.isfile(path):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
                if isinstance(exc, FileExistsError):  # memory: of an object at a level above, or of objects below
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
                raise

    def get(self, key: str) -> bytes:
        return bytes(self._fs.cat_file(f"{self._root}/{key}"))

    def get_ranges(self, key: str, ranges: Ranges) -> Blocks:
        paths, starts, ends = [f"{self._root}/{key}"] * len(ranges), [a for a, _ in ranges], [b for _, b in ranges]
        return [bytes(block) for block in self._fs.cat_ranges(paths, starts, ends, on_error="raise")]

    def get_sized(self, key: str, start: int, end: int) -> tuple[bytes, int]:
        size = self.size(key)
        return self.get_ranges(key, [(start, min(end, size))])[0] if start < min(end, size) else b"", size

    def size(self, key: str) -> int:
        self._fs.invalidate_cache()
        info = self._fs.info(f"{self._root}/{key}")
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "not an object", key)
        return int(info["size"])

    def find(self, prefix: str) -> Iterable[str]:
        self._fs.invalidate_cache()
        base = f"{self._root}/{prefix}".rstrip("/") + "/"
        for path in self._fs.find(base):
            if path.startswith(base):
                yield path.removeprefix(f"{self._root}/")

    def delete(self, key: str) -> None:
        self._fs.rm_file(f"{self._root}/{key}")

    def sweep(self) -> None:
        """Nothing is left by dead writers."""

    def explain(self, exc: Exception, what: str) -> StoreError | None:
        if isinstance(exc, OSError):
            return _explain_os_error(exc, what, self._secrets)
        return StoreError(f"{what}: {type(exc).__name__}: {_told(exc, self._secrets)}")
