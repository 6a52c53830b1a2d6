"""What kinds of stores there are: the local file system, the clouds through obstore, anything else through fsspec.

`objects` checks keys, verifies bytes and tells errors; here is what each kind does to create an object exclusively and
whole. docs/store-backends.md has the choice, its figures and its limits.
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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from copy import copy
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, Self, TypeVar
from urllib.parse import quote
from uuid import uuid4

import fsspec

from fedflow.errors import (
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
    from obstore.store import S3Store

P = TypeVar("P")
T = TypeVar("T")

__all__ = [
    "RESERVED",
    "Backend",
    "Blocks",
    "Buffers",
    "Data",
    "Ranges",
    "connect",
    "key_problem",
    "publish_by_link",
    "publish_under_lock",
]

Data = bytes | memoryview
Blocks = list[bytes]
Buffers = Sequence[memoryview]  # of bytes, writable, to be filled one after the other
Ranges = Sequence[tuple[int, int]]  # start, end (exclusive), in bytes
Publish = Callable[[Path, Path], object]  # gives a temporary file its name

RESERVED = ".fedflow-"  # names that begin so are the store's own: temporary files, locks, probes
_TEMPORARY = f"{RESERVED}tmp-"

_CLOUD = ("s3", "gs", "az", "abfs", "abfss")  # schemes that obstore serves
_CLIENT: dict[str, float] = {
    "connect_timeout": 10,
    "timeout": 120,
}  # seconds; the second for a whole request, with its up to 8 MiB
_RETRY = {"max_retries": 100, "retry_timeout": 60, "backoff": {"init_backoff": 0.1, "max_backoff": 60, "base": 3}}
_DOWNLOAD, _DOWNLOADS = 8 << 20, 4  # bytes a request, requests at once
_UPLOAD, _UPLOADS = 8 << 20, 4  # bytes a request, requests at once
_MOST_PARTS = 9_000  # requests an object; S3 takes 10,000
_STEP = 1 << 20  # bytes of a file that are read at once: they are still in the processor's cache when they are hashed
_AHEAD = 4  # the disk reads so many times as much ahead as was asked for: several threads ask in turn
_STEP_BUFFERS = 512  # filled at once; the kernel takes 1024
_WRITER = "fedflowwriter"  # metadata of a created object; a name that Azure takes too

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
_MEMORY = threading.Lock()  # fsspec's memory file system is not made for threads: its files have one position for all


class Backend(Protocol):
    """What a kind of store does with checked keys. Raises its own exceptions; `explain` turns them into ours."""

    probe_races: int  # races that `probe` holds
    probe_writers: int  # in each of them

    def at(self, prefix: str) -> Self: ...
    def patient(self, limit: timedelta) -> Self: ...  # gives up a transfer in which nothing happened for so long
    def create(self, key: str, data: memoryview) -> None: ...  # exclusive
    def overwrite(self, key: str, data: memoryview) -> None: ...
    def stream(self, key: str, parts: Iterator[Data], size: int) -> None: ...  # overwrites; size: about
    def get(self, key: str) -> bytes: ...
    def get_ranges(self, key: str, ranges: Ranges) -> Blocks: ...  # no range is empty; a block may be short at the end
    def get_sized(self, key: str, start: int, end: int) -> tuple[bytes, int]: ...  # the range, the size of the object
    def fill(self, key: str, start: int, buffers: Buffers) -> Iterator[tuple[memoryview, int]]:
        """Fill `buffers` from `start` on: each piece as soon as it is there, with the size of the object. Stops at its end."""
        ...

    def size(self, key: str) -> int: ...
    def find(self, prefix: str) -> Iterable[str]: ...
    def delete(self, key: str) -> None: ...  # FileNotFoundError is fine
    def sweep(self, age: timedelta) -> None: ...  # remove what nobody wrote to for so long
    def explain(self, exc: Exception, what: str) -> StoreError | None: ...  # None: no error of the store


def key_problem(key: str) -> str | None:
    """Why `key` is no relative POSIX path of plain names; None if it is one."""
    if not isinstance(key, str) or not key:
        return f"{key!r} is no key: expected a relative path such as 'rounds/00001/plan.json'"
    for segment in key.split("/"):
        if segment in ("", ".", ".."):
            return f"key {key!r} has the segment {segment!r}: expected plain names between single slashes"
        if segment.startswith(RESERVED):
            return f"key {key!r} has the segment {segment!r}: names that begin with {RESERVED!r} are the store's own"
    if key.isascii() and key.isprintable() and "\\" not in key:
        return None
    bad = next((char for char in key if char == "\\" or unicodedata.category(char) in ("Cc", "Cs")), None)
    return f"key {key!r} has the character {bad!r}: expected printable text without backslashes" if bad else None


def connect(url: str, options: dict[str, Any]) -> tuple[str, Backend]:
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme in ("file", "local"):
        return _connect_local(rest if separator else url, options)
    place = _without_login(scheme, rest).rstrip("/")
    shown = f"{scheme}://{place}"
    path = place.partition("/")[2]
    if path and (problem := key_problem(path)):
        raise KeyEscapesRoot(f"{shown}: {problem}")
    if scheme == "memory" and not options:
        return shown, _Memory(fsspec.filesystem("memory"), f"/{place}", (), _MEMORY)
    if scheme == "memory":
        raise StoreError(f"{shown}: found the options {sorted(options)}, expected none for a store in memory")
    secrets = _secrets(options)
    if scheme not in _CLOUD:
        return shown, _Fsspec(*_open_fsspec(url, shown, options), secrets)
    if place != rest.rstrip("/"):
        raise StoreError(f"{shown}: found a login in the URL, expected credentials in the options or the environment")
    return shown, _Cloud(partial(_open_cloud, shown, options, secrets), secrets)


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


def _connect_local(path: str, options: Mapping[str, Any]) -> tuple[str, Backend]:
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
        if not _has_link(self._root, self._prefix + key):
            return Path(base + key)
        real = os.path.realpath(base + key)
        if not f"{real}/".startswith(base):
            raise KeyEscapesRoot(f"file://{base}: a symbolic link leads from key {key!r} to {real}, out of the root")
        return Path(base + key)

    def patient(self, limit: timedelta) -> Self:
        return self

    def create(self, key: str, data: memoryview) -> None:
        self._put(key, [data], self._publish)

    def overwrite(self, key: str, data: memoryview) -> None:
        self._put(key, [data], Path.replace)

    def stream(self, key: str, parts: Iterator[Data], size: int) -> None:
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

    def fill(self, key: str, start: int, buffers: Buffers) -> Iterator[tuple[memoryview, int]]:
        """Through no mapping, whose pages would count as this process's memory; nor is what was read kept in the page cache."""
        with self._open(key, buffering=0) as file:
            size, end = _size(file), start + sum(map(len, buffers))
            _advise(file, start, end + _AHEAD * (end - start), "POSIX_FADV_WILLNEED")
            at = start
            for step in _steps(buffers):
                read = os.preadv(file.fileno(), step, at)
                at += read
                yield from ((view, size) for view in _filled(step, read))
                if read < sum(map(len, step)):
                    break
            _advise(file, start, end, "POSIX_FADV_DONTNEED")

    @contextmanager
    def _open(self, key: str, buffering: int = -1) -> Iterator[IO[bytes]]:
        with _directory_is_no_object(), self._path(key).open("rb", buffering=buffering) as file:
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

    def sweep(self, age: timedelta) -> None:
        """Temporary files, by the clock of the file system itself."""
        base = self._path("")
        with tempfile.NamedTemporaryFile(prefix=_TEMPORARY, dir=base) as clock:
            oldest = os.fstat(clock.fileno()).st_mtime - age.total_seconds()
        for directory, _, names in os.walk(base):
            for name in names:
                path = Path(directory, name)
                with suppress(OSError):  # another user's, or just gone
                    if name.startswith(_TEMPORARY) and path.lstat().st_mtime < oldest:
                        path.unlink()

    def explain(self, exc: Exception, what: str) -> StoreError | None:
        return _explain_os_error(exc, what) if isinstance(exc, OSError) else None


def _has_link(root: str, path: str) -> bool:
    """Whether some part of `path` below `root` is a symbolic link; as `os.path.realpath`, in a tenth of its time."""
    at = root
    for name in path.split("/"):
        at = f"{at}/{name}"
        try:
            if stat.S_ISLNK(os.lstat(at).st_mode):
                return True
        except OSError:  # not there, and nothing below it
            return False
    return False


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
    with path.with_name(f"{RESERVED}lock").open("ab") as lock:
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


def _advise(file: IO[bytes], start: int, end: int, advice: str) -> None:
    """Tell the kernel of a large range, where it listens (Linux)."""
    if end - start >= _STEP and hasattr(os, advice):
        os.posix_fadvise(file.fileno(), start, end - start, getattr(os, advice))


def _steps(buffers: Buffers) -> Iterator[Buffers]:
    """`buffers` in portions of at most `_STEP` bytes."""
    portion: list[memoryview] = []
    room = _STEP
    for buffer in buffers:
        while len(buffer):
            head, buffer = buffer[:room], buffer[room:]
            portion.append(head)
            room -= len(head)
            if not room or len(portion) == _STEP_BUFFERS:
                yield portion
                portion, room = [], _STEP
    if portion:
        yield portion


def _filled(buffers: Buffers, count: int) -> Iterator[memoryview]:
    """The first `count` bytes of `buffers`; one empty piece if there are none."""
    if not count:
        yield memoryview(b"")
    for buffer in buffers:
        if count <= 0:
            return
        yield buffer[:count]
        count -= len(buffer)


def _scattered(pieces: Iterable[tuple[Data, int]], buffers: Buffers) -> Iterator[tuple[memoryview, int]]:
    """Fill `buffers` from pieces of an object, each with the object's size: what was filled, piece by piece."""
    left = deque(buffers)
    for data, size in pieces:
        rest = memoryview(data)
        if not rest:
            yield rest, size
        while rest:
            buffer = left.popleft()
            filled, later = buffer[: len(rest)], buffer[len(rest) :]
            filled[:], rest = rest[: len(filled)], rest[len(filled) :]
            if later:
                left.appendleft(later)
            yield filled, size


def _ahead(call: Callable[[P], T], pieces: Sequence[P], width: int) -> Iterator[T]:
    """`call` of each piece, in order, `width` of them at once; nothing runs any more when this is left."""
    if not pieces:
        return
    with ThreadPoolExecutor(width, "transfer") as pool:
        waiting = deque(pool.submit(call, piece) for piece in pieces[:width])
        try:
            for piece in pieces[width:]:
                yield waiting.popleft().result()
                waiting.append(pool.submit(call, piece))
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


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


def _open_cloud(
    url: str, options: Mapping[str, Any], secrets: tuple[str, ...], limit: timedelta | None = None
) -> CloudStore:
    """limit: no byte for so long is a stall, and so long are requests repeated; what the options say goes before it."""
    try:
        from obstore.store import from_url
    except ImportError:
        raise StoreError(f"{url}: found no package obstore, expected it: pip install 'fedflow[s3]'") from None
    seconds = limit.total_seconds() if limit else 0.0
    client = {**_CLIENT, "allow_http": _plain_http(options)}
    client |= {"read_timeout": seconds, "timeout": max(seconds, _CLIENT["timeout"])} if limit else {}
    retry = {**_RETRY, **({"retry_timeout": seconds} if limit else {})}
    others = {name: value for name, value in options.items() if name not in ("client_options", "retry_config")}
    scheme, _, place = url.partition("://")
    try:
        return from_url(
            f"{scheme}://{quote(place, safe='/@:')}",  # from_url decodes; our URLs are literal
            client_options=_durations(client | dict(options.get("client_options", {}))),
            retry_config=_durations(retry | dict(options.get("retry_config", {}))),
            **others,
        )
    except Exception as exc:
        told = _told(exc, secrets)
        raise StoreError(f"{url}: {told}; expected the options of obstore.store.from_url") from None


def _plain_http(options: Mapping[str, Any]) -> bool:
    """Whether the endpoint is an http:// one: who names it, means it."""
    named = [str(value) for name, value in options.items() if "endpoint" in name.lower()]
    variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
    named += [os.environ.get(name, "") for name in variables]
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

    def __init__(self, connect: Callable[..., CloudStore], secrets: tuple[str, ...]) -> None:
        self._connect, self._store, self._secrets, self._prefix = connect, connect(), secrets, ""

    def at(self, prefix: str) -> Self:
        clone = copy(self)
        clone._prefix = f"{self._prefix}{prefix}/"
        return clone

    def patient(self, limit: timedelta) -> Self:
        clone = copy(self)
        clone._store = self._connect(limit)
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

    def stream(self, key: str, parts: Iterator[Data], size: int) -> None:
        step = max(_UPLOAD, -(-size // _MOST_PARTS))
        _obstore().put(self._store, self._prefix + key, parts, chunk_size=step, max_concurrency=_UPLOADS)

    def get(self, key: str) -> bytes:
        return self._download(key, 0, sys.maxsize)[0]

    def get_sized(self, key: str, start: int, end: int) -> tuple[bytes, int]:
        return self._download(key, start, end)

    def _download(self, key: str, start: int, end: int) -> tuple[bytes, int]:
        """The bytes, as far as there are any, and the size."""
        blocks, sizes = zip(*self._pieces(key, start, end), strict=True)
        return b"".join(blocks), sizes[0]

    def _pieces(self, key: str, start: int, end: int) -> Iterator[tuple[Any, int]]:
        """The same in order, some requests at once; all from one version of the object. At least one piece."""
        obs = _obstore()
        if start >= end:
            yield b"", self.size(key)
            return

        def get(first: int, last: int, **options: Any) -> Any:
            found = obs.get(self._store, self._prefix + key, options={"range": (first, last), **options})
            return found.bytes(), found.meta

        try:
            block, meta = get(start, min(end, start + _DOWNLOAD))
        except obs.exceptions.GenericError as exc:
            # Azure answers with nothing in place of 416
            if _status(exc) != 416 and "Wanted range starting at" not in str(exc):
                raise
            yield b"", self.size(key)  # begins behind the end
            return
        yield block, meta["size"]
        same = {"if_match": meta["e_tag"]} if meta["e_tag"] else {}
        end = min(end, meta["size"])
        later = [(first, min(end, first + _DOWNLOAD)) for first in range(start + _DOWNLOAD, end, _DOWNLOAD)]
        for block, _ in _ahead(lambda piece: get(*piece, **same), later, _DOWNLOADS):
            yield block, meta["size"]

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

    def fill(self, key: str, start: int, buffers: Buffers) -> Iterator[tuple[memoryview, int]]:
        yield from _scattered(self._pieces(key, start, start + sum(map(len, buffers))), buffers)

    def size(self, key: str) -> int:
        return int(_obstore().head(self._store, self._prefix + key)["size"])

    def find(self, prefix: str) -> Iterable[str]:
        for batch in _obstore().list(self._store, self._prefix + prefix, chunk_size=1000):
            for item in batch:
                yield item["path"].removeprefix(self._prefix)

    def delete(self, key: str) -> None:
        _obstore().delete(self._store, self._prefix + key)

    def sweep(self, age: timedelta) -> None:
        """S3's multipart uploads, by when they were begun: it keeps, unseen, what a dead writer sent, and charges for it. Where
        keys are not given, or do not allow it, and on GCS and Azure, a lifecycle rule has to do it.
        """
        from obstore.store import S3Store

        known = "access_key_id" in getattr(self._store, "config", {}) or "AWS_ACCESS_KEY_ID" in os.environ
        if isinstance(self._store, S3Store) and known:
            with suppress(Exception):  # botocore has errors of its own; nothing depends on this
                _abort_uploads(self._store, self._prefix, before=datetime.now(UTC) - age)

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
            return StoreUnwritable(
                f"{told}; expected credentials that the store accepts for this, and a clock that is right"
            )
        if isinstance(exc, found.PreconditionError):
            return StoreUnavailable(f"{told}; the object was replaced during the read: try again")
        if status == 416:
            return ObjectCorrupt(f"{told}; found the end of the object before the range, expected all of it")
        broken = status is None and "HTTP error" in told and "builder error" not in told
        if broken or (status or 0) >= 500 or status in (408, 429):
            return StoreUnavailable(f"{told}; try again")
        return StoreError(told)


def _abort_uploads(store: S3Store, prefix: str, before: datetime) -> None:
    """What obstore cannot do, s3fs does; the first thousand of them. Raises what botocore raises."""
    from s3fs import S3FileSystem

    config = store.config
    fs = S3FileSystem(
        key=config.get("access_key_id"),
        secret=config.get("secret_access_key"),
        token=config.get("session_token"),
        endpoint_url=config.get("endpoint"),
        client_kwargs={"region_name": config["region"]} if "region" in config else {},
        config_kwargs={"connect_timeout": 5, "read_timeout": 10, "retries": {"max_attempts": 1}},
        skip_instance_cache=True,
    )
    below = f"{store.prefix}/{prefix}" if store.prefix else prefix
    found = fs.call_s3("list_multipart_uploads", Bucket=config["bucket"], Prefix=below)
    for upload in found.get("Uploads", ()):
        if upload["Initiated"] < before:
            fs.call_s3(
                "abort_multipart_upload", Bucket=config["bucket"], Key=upload["Key"], UploadId=upload["UploadId"]
            )


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
    """Objects behind `pipe_file(mode="create")`: exclusive under `lock`, else only if `probe` found it so.

    lock: held during each call, for a file system that one thread at a time may use.
    """

    def __init__(self, fs: Any, root: str, secrets: tuple[str, ...], lock: threading.Lock | None = None) -> None:
        self._fs, self._root, self._secrets = fs, root.rstrip("/"), secrets
        self._lock: AbstractContextManager[Any] = lock or nullcontext()
        self.probe_races, self.probe_writers = (2 if lock else 8), 8

    def at(self, prefix: str) -> Self:
        clone = copy(self)
        clone._root = f"{self._root}/{prefix}"
        return clone

    def patient(self, limit: timedelta) -> Self:
        return self

    def create(self, key: str, data: memoryview) -> None:
        self._pipe(key, data, "create")

    def overwrite(self, key: str, data: memoryview) -> None:
        self._pipe(key, data, "overwrite")

    def stream(self, key: str, parts: Iterator[Data], size: int) -> None:
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
        with self._lock:
            return bytes(self._fs.cat_file(f"{self._root}/{key}"))

    def get_ranges(self, key: str, ranges: Ranges) -> Blocks:
        paths, starts, ends = [f"{self._root}/{key}"] * len(ranges), [a for a, _ in ranges], [b for _, b in ranges]
        with self._lock:
            return [bytes(block) for block in self._fs.cat_ranges(paths, starts, ends, on_error="raise")]

    def get_sized(self, key: str, start: int, end: int) -> tuple[bytes, int]:
        size = self.size(key)
        return self.get_ranges(key, [(start, min(end, size))])[0] if start < min(end, size) else b"", size

    def fill(self, key: str, start: int, buffers: Buffers) -> Iterator[tuple[memoryview, int]]:
        yield from _scattered([self.get_sized(key, start, start + sum(map(len, buffers)))], buffers)

    def size(self, key: str) -> int:
        with self._lock:
            self._fs.invalidate_cache()
            info = self._fs.info(f"{self._root}/{key}")
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "not an object", key)
        return int(info["size"])

    def find(self, prefix: str) -> Iterable[str]:
        base = f"{self._root}/{prefix}".rstrip("/") + "/"
        with self._lock:
            self._fs.invalidate_cache()
            paths = self._fs.find(base)
        for path in paths:
            if path.startswith(base):
                yield path.removeprefix(f"{self._root}/")

    def delete(self, key: str) -> None:
        with self._lock:
            self._fs.rm_file(f"{self._root}/{key}")

    def sweep(self, age: timedelta) -> None:
        """Nothing is left by dead writers."""

    def explain(self, exc: Exception, what: str) -> StoreError | None:
        if isinstance(exc, OSError):
            return _explain_os_error(exc, what, self._secrets)
        return StoreError(f"{what}: {type(exc).__name__}: {_told(exc, self._secrets)}")


class _Memory(_Fsspec):
    """fsspec's files in memory, of which `info` goes through all, whichever is asked for."""

    def size(self, key: str) -> int:
        path = f"{self._root}/{key}"
        with self._lock:
            if not self._fs.isfile(path):
                raise FileNotFoundError(errno.ENOENT, "not an object", key)
            return int(self._fs.store[path].size)
