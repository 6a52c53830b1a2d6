"""Reading an object from front to back in small memory."""

from __future__ import annotations

from blake3 import blake3

from fedflow.store.backends import Buffers
from fedflow.store.objects import ObjectRef, ObjectStore

__all__ = ["Reader"]

_SKIP = 1 << 20  # bytes that are read at once where nobody wants them


class Reader:
    """Reads parts of one object into buffers of the caller's, and each byte once if the parts are asked for in their order.

    A chunk is verified when its last byte has gone by: what was read counts only after `finish` has returned. Memory holds
    the state of a hash, whatever the size of object, chunk and parts. Not for several threads at a time.
    """

    def __init__(self, store: ObjectStore, ref: ObjectRef) -> None:
        self.store, self.ref = store, ref
        self._chunk = ref.chunk_size if ref.chunks else max(ref.size, 1)
        self._at, self._hash = 0, blake3()

    def read_into(self, start: int, buffers: Buffers) -> None:
        """Fill `buffers`, one after the other, with the bytes from `start` on. Raises ObjectMissing, ObjectCorrupt.

        Behind the last part: without detour, what lies between being read with it. Elsewhere: after the rest of the
        chunk that was begun, and from the beginning of the chunk that `start` lies in.
        """
        end = start + sum(map(len, buffers))
        if not 0 <= start <= end <= self.ref.size:
            raise ValueError(f"{self.ref.key}: found {start} to {end}, expected a part of its {self.ref.size} bytes")
        if start == end:
            return
        if not self._at <= start <= self._at + 2 * self._chunk:
            self.finish()
            self._at = start - start % self._chunk
        self._skip_to(start)
        self._take(buffers)

    def finish(self) -> None:
        """Read and verify the rest of the chunk that was begun. Raises ObjectCorrupt."""
        if self._at % self._chunk:
            self._skip_to(self._end)

    def verify(self) -> None:
        """Read and verify whatever lies behind what was read last. Raises ObjectMissing, ObjectCorrupt."""
        self._skip_to(self.ref.size)

    @property
    def _end(self) -> int:
        """Where the chunk ends that is being read."""
        return min(self.ref.size, (self._at // self._chunk + 1) * self._chunk)

    def _skip_to(self, position: int) -> None:
        unwanted = memoryview(bytearray(min(_SKIP, position - self._at)))
        while self._at < position:
            self._take([unwanted[: position - self._at]])

    def _take(self, buffers: Buffers) -> None:
        for view in self.store.fill(self.ref, self._at, buffers):
            while view:
                head, view = view[: self._end - self._at], view[self._end - self._at :]
                self._hash.update(head)
                self._at += len(head)
                if self._at == self.ref.size or not self._at % self._chunk:
                    self._close()

    def _close(self) -> None:
        found, self._hash = self._hash.hexdigest(), blake3()
        self.store.verify(self.ref, (self._at - 1) // self._chunk, f"blake3:{found}")
