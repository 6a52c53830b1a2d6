"""The guarantees of `fedflow.store.objects.ObjectStore` as tests that any backend can be put through.

    class TestMine(SharedStoreConformance):
        @pytest.fixture
        def store(self) -> ObjectStore:
            return ObjectStore("mine://somewhere/empty")

`StoreConformance` does without other processes, for a backend whose objects those cannot see.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedflow.errors import KeyEscapesRoot, ObjectCorrupt, ObjectExists, ObjectMissing
from fedflow.store.objects import ObjectRef, ObjectStore, digest
from fedflow.store.reading import Reader

__all__ = ["SharedStoreConformance", "StoreConformance", "nasty_keys", "start_python", "together"]

WRITERS = 16
MEBIBYTE = 1 << 20
REFUSED = [
    *("", ".", "..", "/", "/a", "//a", "a/", "a//b", "./a", "a/.", "a/./b", "../a", "a/..", "a/../b", "a/../../b"),
    *(
        "s3://bucket/a",
        "file:///a",
        "memory://a",
        "a\\b",
        "..\\a",
        "a\0b",
        "a\nb",
        "a\x7fb",
        "\ud800",
        ".fedflow-tmp-a",
    ),
]

_SEGMENTS = [
    *("", ".", "..", "...", "a", "b", "~", " ", "a b", "%2e%2e", "%2F", "a%b", "..\\", "\\", "\0", "\n", "\x85", "C:"),
    *("s3:", "file:", "*", "?", "#", "[a]", "{a}", "a;b", "a&b=c", "+", "@", "ä", "a\u0308", "\u202e", "日本", "😀"),
    *("\ud800", "-rf", "$HOME", "`a`", "'", '"', "<a>", "|", ".fedflow-tmp-a", ".fedflow-lock", ".hidden", "NUL", "a."),
]  # fmt: skip


def nasty_keys() -> st.SearchStrategy[str]:
    """Keys that are meant to break out: each one must be refused or stay where it belongs."""
    joined = st.lists(st.sampled_from(_SEGMENTS), min_size=1, max_size=5).map("/".join)
    return joined | st.text(max_size=20) | st.sampled_from(REFUSED)


def start_python(code: str, *args: str, within: Sequence[str] = (), **options: Any) -> subprocess.Popen[str]:
    """A Python process of its own that runs `code` with `args`, with pipes to its standard input and output.

    within: a command that starts the process (`unshare ...`); options: more of `subprocess.Popen`.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [*within, sys.executable, "-c", code, *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, **options)


_RACE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from fedflow.errors import ObjectExists
from fedflow.store.objects import ObjectStore

url, first, count, size = sys.argv[1], *map(int, sys.argv[2:])
store = ObjectStore(url)

def create(number):
    try:
        store.put("raced", bytes([number]) * size)
    except ObjectExists:
        return False
    return True

print("ready", flush=True)
sys.stdin.readline()
numbers = range(first, first + count)
with ThreadPoolExecutor(count) as pool:
    won = pool.map(create, numbers)
print([number for number, winner in zip(numbers, won) if winner])
"""

_PUT_FOR_EVER = """
import itertools, sys
from fedflow.store.objects import ObjectStore

url, size = sys.argv[1], int(sys.argv[2])
store = ObjectStore(url)
for number in itertools.count():
    store.put(f"puts/{number:05}", bytes([number % 256]) * size)
    print(number, flush=True)
"""

_STREAM_HALF = """
import sys
from fedflow.store.objects import ObjectStore

def parts():
    yield bytes(20 << 20)
    print("half", flush=True)
    sys.stdin.readline()
    yield bytes(20 << 20)

ObjectStore(sys.argv[1]).write_stream("streamed", parts())
"""

property_test = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)


def together(calls: Iterable[Callable[[], Any]]) -> list[Any]:
    """The results of the calls, each made by its own thread, all at the same instant."""
    calls = list(calls)
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def flipped(data: bytes, at: int) -> bytes:
    """The bytes with one bit of one of them changed."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


class StoreConformance:
    """Inherit and provide `store`, an empty ObjectStore over the backend."""

    @pytest.fixture
    def store(self) -> ObjectStore:
        raise NotImplementedError("provide an empty store")

    # --- putting and getting

    @pytest.mark.parametrize("data", [b"", b"\0", b"some bytes", os.urandom(3 * MEBIBYTE)], ids=len)
    @pytest.mark.parametrize("mode", ["create", "overwrite"])
    def test_what_is_put_is_got(self, store: ObjectStore, data: bytes, mode: Any) -> None:
        store.put("a/b/c", memoryview(data), mode=mode)
        assert (store.get("a/b/c"), store.size("a/b/c"), store.exists("a/b/c")) == (data, len(data), True)

    def test_another_instance_of_the_same_url_sees_the_same_objects(self, store: ObjectStore) -> None:
        store.child("a").put("b", b"seen")
        again = ObjectStore(store.url)
        assert (again.url, again.get("a/b"), ObjectStore(store.child("a").url).list()) == (store.url, b"seen", ["b"])

    def test_a_missing_object_is_named(self, store: ObjectStore) -> None:
        calls = (store.get, store.size, lambda key: store.get_range(key, 0, 1), lambda key: store.read(ref(key)))
        for call in calls:
            with pytest.raises(ObjectMissing) as caught:
                call("no/such")
            assert store.url in str(caught.value) and "no/such" in str(caught.value)
        assert not store.exists("no/such")

    def test_levels_above_an_object_are_no_objects(self, store: ObjectStore) -> None:
        store.put("a/b/c", b"")
        assert [store.exists(key) for key in ("a", "a/b", "a/b/c", "a/b/c/d")] == [False, False, True, False]
        with pytest.raises(ObjectMissing):
            store.get("a/b")

    def test_deleting_is_idempotent(self, store: ObjectStore) -> None:
        store.put("a/b", b"1")
        for _ in range(2):
            store.delete("a/b")
            store.delete("never/there")
        assert not store.exists("a/b")
        store.put("a/b", b"2")
        assert store.get("a/b") == b"2"

    def test_the_list_is_of_all_keys_below_the_prefix_sorted(self, store: ObjectStore) -> None:
        keys = ["a", "b/1", "b/10", "b/2/x", "b/2/y/z", "ba/1", "c.d/e"]
        for key in reversed(keys):
            store.put(key, b"")
        assert store.list() == keys
        assert store.list("b") == ["b/1", "b/10", "b/2/x", "b/2/y/z"]
        assert store.list("b/2") == ["b/2/x", "b/2/y/z"]
        assert store.list("a") == store.list("none") == []

    # --- create-only

    def test_a_second_create_fails_and_changes_nothing(self, store: ObjectStore) -> None:
        store.put("a/b", b"first")
        for _ in range(2):
            with pytest.raises(ObjectExists, match="a/b"):
                store.put("a/b", b"second and longer")
        assert store.get("a/b") == b"first"

    @pytest.mark.parametrize("size", [1, MEBIBYTE])
    def test_of_racing_creators_exactly_one_wins_and_all_see_its_bytes(self, store: ObjectStore, size: int) -> None:
        def creator(payload: bytes) -> Callable[[], tuple[bool, bytes]]:
            def create() -> tuple[bool, bytes]:
                try:
                    store.put("new/place/raced", payload)
                except ObjectExists:
                    return False, store.get("new/place/raced")
                return True, store.get("new/place/raced")

            return create

        payloads = [bytes([number]) * size for number in range(WRITERS)]
        results = together(map(creator, payloads))
        winners = [payload for payload, (won, _) in zip(payloads, results, strict=True) if won]
        assert len(winners) == 1
        assert all(seen == winners[0] for _, seen in results)

    def test_overwriting_replaces_all_bytes(self, store: ObjectStore) -> None:
        store.put("a", b"first and longer")
        store.put("a", b"second", mode="overwrite")
        assert store.get("a") == b"second"

    def test_readers_see_one_version_or_the_other(self, store: ObjectStore) -> None:
        versions = [b"A" * MEBIBYTE, b"B" * (2 * MEBIBYTE)]
        store.put("a", versions[0])

        def write() -> list[bytes]:
            for lap in range(12):
                store.put("a", versions[lap % 2], mode="overwrite")
            return []

        def read() -> list[bytes]:
            return [store.get("a") for _ in range(12)]

        assert all(seen in versions for found in together([write, read, read]) for seen in found)

    def test_threads_do_not_disturb_each_other(self, store: ObjectStore) -> None:
        def worker(number: int) -> Callable[[], None]:
            def work() -> None:
                mine, data = store.child(f"site/{number}"), bytes([number]) * 10_000
                for lap in range(5):
                    mine.put(f"{lap}", data)
                    assert mine.get_range(f"{lap}", 10, 20) == data[10:20]
                assert mine.list() == ["0", "1", "2", "3", "4"]

            return work

        together([worker(number) for number in range(WRITERS)])
        assert len(store.list()) == 5 * WRITERS

    # --- ranges

    def test_ranges_are_exact(self, store: ObjectStore) -> None:
        data = bytes(range(256)) * 40
        store.put("a", data)
        ranges = [(0, 1), (10, 10), (1, 300), (299, 301), (0, len(data)), (len(data) - 1, len(data)), (5000, 5001)]
        assert store.get_ranges("a", ranges) == [data[start:end] for start, end in ranges]
        assert [store.get_range("a", start, end) for start, end in ranges] == store.get_ranges("a", ranges)
        assert store.get_ranges("a", []) == []

    @pytest.mark.parametrize("ranges", [[(5, 11)], [(10, 11)], [(50, 60)], [(0, 2), (50, 60)], [(0, 2), (3, 11)]])
    def test_a_range_beyond_the_end_is_an_error_not_less(self, store: ObjectStore, ranges: Any) -> None:
        store.put("some/key", b"0123456789")
        with pytest.raises(ObjectCorrupt, match=r"some/key.*expected bytes.*found"):
            store.get_ranges("some/key", ranges)

    @pytest.mark.parametrize(("start", "end"), [(-1, 1), (2, 1), (-2, -1)])
    def test_a_range_that_is_none_is_a_mistake(self, store: ObjectStore, start: int, end: int) -> None:
        store.put("a", b"0123456789")
        with pytest.raises(ValueError, match="expected 0 <= start <= end"):
            store.get_range("a", start, end)

    # --- references

    def test_an_object_is_named_by_its_content(self, store: ObjectStore) -> None:
        data = os.urandom(1000)
        ref = store.write("some/objects", data, ".bin")
        assert ref.key == f"some/objects/{digest(data).removeprefix('blake3:')}.bin"
        assert (store.list(), ref.size, ref.digest) == ([ref.key], 1000, digest(data))
        assert store.write("some/objects", memoryview(data), ".bin") == ref
        assert store.read(ref) == data

    def test_writing_again_sends_nothing_if_the_size_is_right_and_heals_if_not(self, store: ObjectStore) -> None:
        data = os.urandom(1000)
        ref = store.write("objects", data)
        store.put(ref.key, bytes(1000), mode="overwrite")
        store.write("objects", data)
        assert store.get(ref.key) == bytes(1000)
        store.put(ref.key, data[:999], mode="overwrite")
        store.write("objects", data)
        assert store.get(ref.key) == data

    def test_a_stream_is_the_object_of_its_parts(self, store: ObjectStore) -> None:
        data = os.urandom(300_000)
        parts = (data[start : start + 70_001] for start in range(0, len(data), 70_001))
        ref = store.write_stream("a/stream", parts, chunk_size=65_536)
        assert ref == ObjectRef.of("a/stream", data, 65_536)
        assert (len(ref.chunks), store.read(ref), store.get("a/stream")) == (5, data, data)
        assert store.read(store.write_stream("empty", [])) == b""

    def test_a_stream_whose_source_fails_leaves_nothing(self, store: ObjectStore) -> None:
        def parts() -> Iterator[bytes]:
            yield bytes(9 * MEBIBYTE)
            raise OSError("the source's own")

        with pytest.raises(OSError, match="the source's own"):
            store.write_stream("a", parts())
        assert store.list() == []

    @given(st.lists(st.tuples(st.integers(0, 3500), st.integers(0, 3500)).map(sorted), max_size=5))
    @property_test
    def test_any_parts_are_read_verified(self, store: ObjectStore, bounds: list[list[int]]) -> None:
        data = bytes(number % 251 for number in range(3500))
        ref = store.write("objects", data, chunk_size=1000)
        ranges = [(start, end) for start, end in bounds]
        assert store.read_ranges(ref, ranges) == [data[start:end] for start, end in ranges]
        assert [store.read(ref, start, end) for start, end in ranges] == store.read_ranges(ref, ranges)

    @given(st.lists(st.lists(st.integers(0, 3500), min_size=3, max_size=3).map(sorted), max_size=5))
    @property_test
    def test_a_reader_fills_buffers_with_any_parts(self, store: ObjectStore, bounds: list[list[int]]) -> None:
        data = bytes(number % 251 for number in range(3500))
        reader = Reader(store, store.write("objects", data, chunk_size=1000))
        for start, middle, end in bounds:
            buffers = [bytearray(middle - start), bytearray(end - middle)]
            reader.read_into(start, [memoryview(buffer) for buffer in buffers])
            assert b"".join(buffers) == data[start:end]
        reader.finish()

    def test_a_reader_finds_another_bit_and_another_size(self, store: ObjectStore) -> None:
        data = os.urandom(3500)
        ref = store.write("objects", data, chunk_size=1000)
        for other in (flipped(data, 2500), data[:-1], data[:2400], b"", data + b"1"):
            store.put(ref.key, other, mode="overwrite")
            with pytest.raises(ObjectCorrupt, match=f"{ref.key}.*expected .*found"):
                Reader(store, ref).verify()

    @pytest.mark.parametrize(("start", "end"), [(-1, 5), (5, 4), (0, 101), (101, 101)])
    def test_a_part_that_is_none_is_a_mistake(self, store: ObjectStore, start: int, end: int) -> None:
        ref = store.write("objects", bytes(100))
        with pytest.raises(ValueError, match=r"expected .*(start|within)"):
            store.read(ref, start, end)

    @pytest.mark.parametrize("at", [0, 57, 99])
    def test_one_flipped_bit_is_detected_and_named(self, store: ObjectStore, at: int) -> None:
        data = os.urandom(100)
        ref = store.write("objects", data)
        store.put(ref.key, flipped(data, at), mode="overwrite")
        for bounds in ((), (0, 1)):
            with pytest.raises(ObjectCorrupt) as caught:
                store.read(ref, *bounds)
            for part in (ref.key, f"expected {ref.digest}", f"found {digest(flipped(data, at))}"):
                assert part in str(caught.value)

    def test_a_flipped_bit_shows_in_its_chunk_only(self, store: ObjectStore) -> None:
        data = os.urandom(3500)
        ref = store.write("objects", data, chunk_size=1000)
        store.put(ref.key, flipped(data, 2500), mode="overwrite")
        assert store.read(ref, 0, 2000) + store.read(ref, 3000) == data[:2000] + data[3000:]
        for start, end in ((2999, 3000), (1999, 2001), (0, 3499)):
            with pytest.raises(ObjectCorrupt, match=f"{ref.key}.*{ref.chunks[2]} in chunk 2 of 4.*found"):
                store.read(ref, start, end)
        with pytest.raises(ObjectCorrupt, match=ref.chunks[2]):
            store.read_ranges(ref, [(0, 10), (2100, 2200)])
        with pytest.raises(ObjectCorrupt, match=ref.chunks[2]):
            store.read(ref)

    @pytest.mark.parametrize("found", [0, 1, 2999, 3499, 3501, 5000])
    def test_another_size_is_detected_and_named(self, store: ObjectStore, found: int) -> None:
        data = os.urandom(3500)
        ref = store.write("objects", data, chunk_size=1000)
        store.put(ref.key, (data + data)[:found], mode="overwrite")
        for bounds in ((), (0, 10), (3400, 3500)):
            with pytest.raises(ObjectCorrupt, match=f"{ref.key}.*expected 3500 bytes.*found {found} bytes"):
                store.read(ref, *bounds)

    def test_a_claim_to_be_huge_takes_no_memory(self, store: ObjectStore) -> None:
        store.put("a", b"0123456789")
        with pytest.raises(ObjectCorrupt, match="found 10 bytes"):
            store.read(ObjectRef("a", 1 << 60, digest(b""), chunk_size=1 << 60))
        for ranges in ([(0, 1 << 60)], [(5, 6), (0, 1 << 60)]):
            with pytest.raises(ObjectCorrupt, match="found 10 bytes from 0 on"):
                store.get_ranges("a", ranges)

    # --- confinement

    @pytest.mark.parametrize("key", REFUSED, ids=ascii)
    def test_a_key_that_is_no_plain_relative_path_is_refused(self, store: ObjectStore, key: str) -> None:
        ways: list[Callable[[str], Any]] = [store.get, store.size, store.exists, store.delete, store.child]
        ways += [lambda key: store.put(key, b""), lambda key: store.write_stream(key, [])]
        ways += [lambda key: store.get_range(key, 0, 1)]
        ways += [] if key == "" else [store.list, lambda key: store.write(key, b"")]
        for way in ways:
            with pytest.raises(KeyEscapesRoot, match=r"expected|own"):
                way(key)
        assert store.list() == []

    @given(key=nasty_keys())
    @property_test
    def test_any_key_is_refused_or_stays_in_its_root(self, store: ObjectStore, key: str) -> None:
        inside = store.child(f"in/{uuid4().hex}")
        store.put("outside", b"untouched", mode="overwrite")
        try:
            inside.put(key, b"nasty")
        except KeyEscapesRoot:
            with pytest.raises(KeyEscapesRoot):
                inside.get(key)
            assert store.list() == ["outside"]
            return
        assert (inside.get(key), inside.list(), inside.size(key)) == (b"nasty", [key], 5)
        assert store.list() == [f"{inside.url.removeprefix(f'{store.url}/')}/{key}", "outside"]
        inside.delete(key)
        assert (inside.list(), store.get("outside")) == ([], b"untouched")

    def test_a_child_is_its_prefix(self, store: ObjectStore) -> None:
        child = store.child("a").child("b/c")
        assert child.url == f"{store.url}/a/b/c"
        child.put("d/e", b"1")
        store.put("a/f", b"2")
        assert (child.list(), child.list("d"), store.list()) == (["d/e"], ["d/e"], ["a/b/c/d/e", "a/f"])
        ref = child.write("objects", b"3")
        assert child.read(ref) == b"3" == store.get(f"a/b/c/{ref.key}")

    # --- before use

    def test_a_patient_store_is_the_same_one(self, store: ObjectStore) -> None:
        patient = store.patient(timedelta(minutes=2))
        assert patient.url == store.url
        patient.child("a").put("b", b"1")
        with pytest.raises(ObjectExists):
            store.put("a/b", b"2")

    def test_the_probe_passes_and_leaves_nothing(self, store: ObjectStore) -> None:
        store.put("a", b"untouched")
        together([store.probe, store.probe])
        assert (store.list(), store.get("a")) == (["a"], b"untouched")


class SharedStoreConformance(StoreConformance):
    """For a backend whose objects other processes see too.

    Those get `store.url` and the environment: what else the backend needs (credentials) must be in the latter.
    """

    def test_of_racing_processes_exactly_one_wins(self, store: ObjectStore) -> None:
        per_process = WRITERS // 4
        with ExitStack() as stack:
            racers = [
                stack.enter_context(start_python(_RACE, store.url, str(first), str(per_process), str(MEBIBYTE)))
                for first in range(0, WRITERS, per_process)
            ]
            for racer in racers:
                assert racer.stdout and racer.stdout.readline() == "ready\n"
            winners = [number for output in together(map(released, racers)) for number in json.loads(output)]
        assert len(winners) == 1
        assert store.get("raced") == bytes(winners) * MEBIBYTE

    def test_a_killed_writer_leaves_whole_objects_only(self, store: ObjectStore) -> None:
        for lap in range(4):
            here = store.child(f"lap{lap}")
            with start_python(_PUT_FOR_EVER, here.url, str(2 * MEBIBYTE)) as writer:
                assert writer.stdout
                acknowledged = [int(writer.stdout.readline()) for _ in range(lap + 1)]
                for _ in range(lap):  # another instant of the put each lap
                    here.list()
                writer.kill()
                acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]
            keys = here.list()
            assert set(keys) >= {f"puts/{number:05}" for number in acknowledged}
            assert all(here.get(key) == bytes([int(key[5:]) % 256]) * (2 * MEBIBYTE) for key in keys)

    def test_a_stream_that_is_killed_half_way_is_not_there(self, store: ObjectStore) -> None:
        with start_python(_STREAM_HALF, store.url) as writer:
            assert writer.stdout and writer.stdout.readline() == "half\n"
            assert store.list() == [] and not store.exists("streamed")
            writer.kill()
        assert store.list() == [] and not store.exists("streamed")
        store.sweep(timedelta())
        store.put("streamed", b"again")
        assert store.get("streamed") == b"again"


def ref(key: str) -> ObjectRef:
    """A reference to an object that need not be there."""
    return ObjectRef.of(key, b"expected")


def released(racer: subprocess.Popen[str]) -> Callable[[], str]:
    """A call that lets the racer go and returns what it prints."""
    return lambda: racer.communicate("\n")[0]
