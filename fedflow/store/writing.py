"""Writing objects a part at a time, by whoever makes the parts."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from queue import Queue
from threading import Thread

from fedflow.errors import FedflowError
from fedflow.store.backends import Data
from fedflow.store.objects import ObjectRef, ObjectStore

__all__ = ["Stream"]

_AHEAD = 2  # parts that wait for the store


class _Abandoned(FedflowError):
    """Nobody wants this object any more."""


class Stream:
    """One object that is being written, by a thread of its own, while its parts are made.

    It is there, whole, when `close` has returned; after `abandon`, or if this process dies, it never was.

    size: bytes of all parts, about
    """

    def __init__(self, store: ObjectStore, key: str, size: int) -> None:
        self._parts: Queue[Data | _Abandoned | None] = Queue(_AHEAD)
        self._done: Future[ObjectRef] = Future()
        Thread(target=self._write, args=(store, key, size), daemon=True).start()

    def push(self, part: Data) -> None:
        """Append `part`, which must not change any more; waits while the store is behind. Raises what writing raised."""
        if self._done.done():
            self._done.result()
        self._parts.put(part)

    def close(self) -> ObjectRef:
        """Wait for the last part. Raises what writing raised."""
        self._parts.put(None)
        return self._done.result()

    def abandon(self) -> None:
        """Write nothing, unless everything is written already."""
        self._parts.put(_Abandoned("abandoned"))
        self._done.exception()

    def _write(self, store: ObjectStore, key: str, size: int) -> None:
        ended = False

        def parts() -> Iterator[Data]:
            nonlocal ended
            while not ended:
                part = self._parts.get()
                ended = part is None or isinstance(part, _Abandoned)
                if isinstance(part, _Abandoned):
                    raise part
                if part is not None:
                    yield part

        try:
            self._done.set_result(store.write_stream(key, parts(), size=size))
        except BaseException as error:
            self._done.set_exception(error)
            while not ended:  # whoever makes the parts is not to wait for room for ever
                part = self._parts.get()
                ended = part is None or isinstance(part, _Abandoned)
