"""The store over its real backends: the local file system, fsspec's memory, S3 (a real SeaweedFS)."""

from __future__ import annotations

import http.client
import json
import os
import re
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import fsspec
import obstore
import pytest
import s3fs
from fsspec.implementations.memory import MemoryFileSystem
from obstore.store import from_url

from fedflow.errors import (
    KeyEscapesRoot,
    ObjectExists,
    StoreError,
    StoreUnavailable,
    StoreUnwritable,
)
from fedflow.store.backends import publish_by_link, publish_under_lock
from fedflow.store.objects import CHUNK_SIZE, ObjectRef, ObjectStore, digest
from fedflow.testing.store import SharedStoreConformance, StoreConformance, start_python, together
from tests.servers import s3_server

# --- local file system -----------------------------------------------------------------------------------------------


class TestLocal(SharedStoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        return ObjectStore(str(tmp_path / "not yet" / "there"))

    def test_no_link_leads_out(self, store: ObjectStore, tmp_path: Path) -> None:
        (tmp_path / "secret").write_bytes(b"secret")
        store.put("in/a", b"mine")
        root = Path(store.url.removeprefix("file://"))
        (root / "file").symlink_to(tmp_path / "secret")
        (root / "directory").symlink_to(tmp_path)
        (root / "in/up").symlink_to("../..")
        for key in ("file", "directory/secret", "in/up/secret", "in/up/new"):
            for way in (store.get, store.size, store.delete, lambda key: store.put(key, b"", mode="overwrite")):
                with pytest.raises(KeyEscapesRoot, match=f"symbolic link.*{re.escape(key)}"):
                    way(key)
        with pytest.raises(KeyEscapesRoot):
            store.child("directory").get("secret")
        assert store.list() == ["in/a"]
        assert (tmp_path / "secret").read_bytes() == b"secret"

    def test_a_link_out_of_a_child_is_refused_though_it_stays_in_the_store(self, store: ObjectStore) -> None:
        store.put("b/secret", b"of b")
        Path(store.url.removeprefix("file://"), "a").symlink_to("b")
        assert store.get("a/secret") == b"of b"
        with pytest.raises(KeyEscapesRoot):
            store.child("a").get("secret")

    def test_a_killed_writer_leaves_only_a_temporary_file_which_the_probe_removes_when_old(
        self, store: ObjectStore
    ) -> None:
        code = """if True:
            import os, signal, sys
            from fedflow.store.objects import ObjectStore

            def parts():
                yield bytes(9 << 20)  # more than is sent at once
                os.kill(os.getpid(), signal.SIGKILL)

            ObjectStore(sys.argv[1]).write_stream("a/b", parts())
        """
        with start_python(code, store.url) as writer:
            pass
        assert writer.returncode == -9
        left = [path for path in files_in(store) if "fedflow-tmp" in path.name]
        assert len(left) == 1
        store.probe()
        assert (store.list(), left[0].exists()) == ([], True)  # it could still be in use
        day_before = left[0].stat().st_mtime - 25 * 3600
        os.utime(left[0], (day_before, day_before))
        store.probe()
        assert files_in(store) == []

    def test_a_directory_that_disappears_is_made_again(self, store: ObjectStore) -> None:
        store.put("a/b/c", b"1")
        shutil.rmtree(store.url.removeprefix("file://"))
        store.put("a/b/c", b"2")
        assert store.get("a/b/c") == b"2"

    @pytest.mark.parametrize("mode", ["create", "overwrite"])
    def test_an_object_and_a_level_of_the_same_name_exclude_each_other(self, store: ObjectStore, mode: Any) -> None:
        store.put("a/b", b"")
        for key in ("a", "a/b/c"):
            with pytest.raises(StoreUnwritable, match="expected no"):
                store.put(key, b"", mode=mode)
        assert store.list() == ["a/b"]

    def test_a_lost_answer_to_a_link_is_no_lost_race(self, tmp_path: Path) -> None:
        written, taken = tmp_path / "written", tmp_path / "taken"
        written.write_bytes(b"1")
        publish_by_link(written, taken)
        publish_by_link(written, taken)  # what NFS does when the first answer got lost
        other = tmp_path / "other"
        other.write_bytes(b"2")
        for publish in (publish_by_link, publish_under_lock):
            with pytest.raises(FileExistsError):
                publish(other, taken)
        assert taken.read_bytes() == b"1"

    def test_too_large_a_file_is_unwritable_and_leaves_nothing(self, tmp_path: Path) -> None:
        def limit_file_size() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

        found = failure_of_a_put(str(tmp_path), preexec=limit_file_size)
        assert found["error"] == "StoreUnwritable" and "'a/b'" in found["text"] and str(tmp_path) in found["text"]
        assert (found["list"], [path for path in tmp_path.rglob("*") if path.is_file()]) == ([], [])

    @pytest.mark.parametrize(("options", "reason"), [("size=1m", "free space"), ("ro", "not read-only")])
    def test_a_full_or_read_only_file_system_is_unwritable(self, tmp_path: Path, options: str, reason: str) -> None:
        """On a real tmpfs, mounted in a name space of its own, for which Linux asks no privilege (some hosts forbid it)."""
        mount = f"mount -t tmpfs -o {options} none {tmp_path} && exec"
        enter = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{mount} "$@"', "sh"]
        if shutil.which("unshare") is None or subprocess.run([*enter, "true"], capture_output=True).returncode:
            pytest.skip("this host forbids name spaces to users")
        found = failure_of_a_put(str(tmp_path), *enter)
        assert found["error"] == "StoreUnwritable" and "expected" in found["text"] and reason in found["text"]
        assert found["list"] == []

    @pytest.mark.parametrize("root", ["/proc/fedflow", "/sys/fedflow", "/dev/null/fedflow", "/dev/null"])
    def test_a_root_that_cannot_be_is_found_by_the_probe(self, root: str) -> None:
        with pytest.raises(StoreUnwritable, match=rf"{root}.*expected.*seen while probing"):
            ObjectStore(root).probe()

    def test_urls_of_one_directory_are_one_url(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "link").symlink_to("s")
        ways = [f"{tmp_path}/s", f"file://{tmp_path}/s/", f"FILE://{tmp_path}/s", "s", "./s", "link", tmp_path / "s"]
        assert {ObjectStore(way).url for way in ways} == {f"file://{tmp_path}/s"}  # type: ignore[arg-type]


class TestLocalWithoutHardLinks(SharedStoreConformance):
    """What a file system without hard links gets instead."""

    def test_looking_and_renaming_are_one_step(self, tmp_path: Path) -> None:
        def publisher(written: Path, taken: Path) -> Callable[[], bool]:
            def publish() -> bool:
                try:
                    publish_under_lock(written, taken)
                except FileExistsError:
                    return False
                return True

            return publish

        for lap in range(30):
            written = [tmp_path / f"{lap}-{number}" for number in range(8)]
            for path in written:
                path.touch()
            assert together([publisher(path, tmp_path / f"{lap}") for path in written]).count(True) == 1

    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        store = ObjectStore(str(tmp_path))
        store._backend._publish = publish_under_lock  # type: ignore[attr-defined]
        return store


def files_in(store: ObjectStore) -> list[Path]:
    root = Path(store.url.removeprefix("file://"))
    return [path for path in root.rglob("*") if path.is_file()]


def failure_of_a_put(url: str, *command: str, preexec: Callable[[], None] | None = None) -> dict[str, Any]:
    """What a process that is run through `command` says about putting 4 MiB: the error, and the list afterwards."""
    code = """if True:
        import json, sys
        from fedflow.errors import StoreError
        from fedflow.store.objects import ObjectStore
        store = ObjectStore(sys.argv[1])
        try:
            store.put("a/b", bytes(4 << 20))
        except StoreError as exc:
            print(json.dumps({"error": type(exc).__name__, "text": str(exc), "list": store.list()}))
    """
    with start_python(code, url, within=command, preexec_fn=preexec) as process:
        found: dict[str, Any] = json.loads(process.communicate()[0])
    return found


# --- memory, and what fsspec has besides -----------------------------------------------------------------------------


class TestMemory(StoreConformance):
    @pytest.fixture
    def store(self) -> ObjectStore:
        return ObjectStore(f"memory://{uuid4().hex}")

    def over(self, filesystem: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
        """An empty store in the memory of that one."""
        monkeypatch.setattr(fsspec, "filesystem", lambda protocol: filesystem)
        return ObjectStore(f"memory://{uuid4().hex}")

    def test_an_object_and_a_level_of_the_same_name_exclude_each_other(self, store: ObjectStore) -> None:
        store.put("a/b", b"")
        for key in ("a", "a/b/c"):
            with pytest.raises(StoreUnwritable, match="expected no"):
                store.put(key, b"")

    def test_a_create_looks_and_writes_under_a_lock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store = self.over(ChecksFirst(), monkeypatch)
        self.test_of_racing_creators_exactly_one_wins_and_all_see_its_bytes(store, 1)

    def test_threads_take_turns_at_listing_and_at_reading(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store = self.over(IsUsedMeanwhile(), monkeypatch)
        store.put("a", b"0123456789")
        reads = together([store.list, lambda: store.get_range("a", 2, 5), lambda: store.get("a")])
        assert reads == [["a"], b"234", b"0123456789"]


class IsUsedMeanwhile(MemoryFileSystem):  # type: ignore[misc]
    """Between two steps of a call, whoever else wants to does something."""

    protocol = "is-used-meanwhile"
    steps = threading.Barrier(2)

    def _others(self) -> None:
        try:
            self.steps.wait(timeout=0.05)
        except threading.BrokenBarrierError:
            self.steps.reset()

    def find(self, path: str, **kwargs: Any) -> Any:
        for key in self.store:
            if key.startswith(path):
                self._others()
        return super().find(path, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> Any:
        with self.open(path) as file:
            file.seek(start or 0)
            self._others()
            return file.read() if end is None else file.read(end - (start or 0))


class IgnoresMode(MemoryFileSystem):  # type: ignore[misc]
    """As obstore's adapter for fsspec: `mode` is accepted and ignored."""

    protocol = "ignores-mode"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        super().pipe_file(path, value)


class ChecksFirst(MemoryFileSystem):  # type: ignore[misc]
    """As fsspec's default: looks whether the key is there, then writes. Here two writers look before either writes."""

    protocol = "checks-first"
    looked = threading.Barrier(2)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if mode == "create" and self.exists(path):
            raise FileExistsError(path)
        try:
            self.looked.wait(timeout=0.05)
        except threading.BrokenBarrierError:
            self.looked.reset()
        super().pipe_file(path, value)


class WritesInPieces(MemoryFileSystem):  # type: ignore[misc]
    """Exclusive, but its objects grow under the eyes of readers."""

    protocol = "in-pieces"
    lock, looked = threading.Lock(), threading.Event()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        with self.lock:
            super().pipe_file(path, value[: len(value) // 2], mode=mode)
            self.looked.clear()
        self.looked.wait(timeout=0.1)  # for a reader, if there is one
        super().pipe_file(path, value)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> Any:
        self.looked.set()
        return super().cat_file(path, start, end)


@pytest.mark.parametrize(
    ("filesystem", "seen"),
    [
        (IgnoresMode, "a second create of the same key succeeded"),
        (ChecksFirst, r"\d of 8 racing creates succeeded"),
        (WritesInPieces, "a reader saw something else"),
    ],
)
def test_the_probe_refuses_a_store_whose_create_is_not_exclusive(filesystem: Any, seen: str) -> None:
    fsspec.register_implementation(filesystem.protocol, filesystem, clobber=True)
    store = ObjectStore(f"{filesystem.protocol}://root")
    with pytest.raises(StoreError, match=rf"{store.url}: {seen}.*expected that exactly one.*Use a"):
        store.probe()
    assert store.list() == []


def test_no_message_shows_a_login_a_signature_or_an_option_that_is_secret() -> None:
    class Talkative(MemoryFileSystem):  # type: ignore[misc]
        protocol = "talkative"

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
            raise OSError("talkative://ann:hunter2@host/a?sig=hunter2 refused the token hunter3 of region north")

    fsspec.register_implementation("talkative", Talkative, clobber=True)
    store = ObjectStore("talkative://ann:hunter2@host/a", {"token": "hunter3", "region": "north"})
    with pytest.raises(StoreError) as caught:
        store.put("b/c", b"")
    assert str(caught.value) == (
        "talkative://host/a: cannot create 'b/c': talkative://host/a refused the token *** of region north"
    )
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None


def test_another_protocol_is_used_if_it_is_exclusive() -> None:
    class Exclusive(MemoryFileSystem):  # type: ignore[misc]
        protocol = "exclusive"
        lock = threading.Lock()

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
            with self.lock:
                super().pipe_file(path, value, mode=mode)

    fsspec.register_implementation("exclusive", Exclusive, clobber=True)
    store = ObjectStore(f"exclusive://{uuid4().hex}")
    store.probe()
    store.put("a/b", b"0123")
    with pytest.raises(ObjectExists):
        store.put("a/b", b"")
    assert (store.list(), store.get_range("a/b", 1, 3)) == (["a/b"], b"12")


# --- S3 --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(s3: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place in the real server, whose address and credentials are in the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    return f"s3://{s3.bucket}/{uuid4().hex}"


class TestS3(SharedStoreConformance):
    @pytest.fixture
    def store(self, bucket: str) -> ObjectStore:
        return ObjectStore(bucket)

    def test_large_objects_go_in_parts_and_come_back_whole(self, store: ObjectStore) -> None:
        data = os.urandom(70 << 20)
        ref = store.write("objects", data)
        assert len(ref.chunks) == 5 and store.get(ref.key) == data == store.read(ref)
        ranges = [(1, 40 << 20), (5, 20), (50 << 20, 69 << 20)]
        assert store.get_ranges(ref.key, ranges) == [data[start:end] for start, end in ranges]
        assert store.read(ref, 20 << 20, 50 << 20) == data[20 << 20 : 50 << 20]

    def test_a_killed_writer_leaves_parts_that_nobody_sees_until_they_are_swept(
        self, s3: Any, bucket: str, store: ObjectStore
    ) -> None:
        code = """if True:
            import os, signal, sys
            from fedflow.store.objects import ObjectStore

            def parts():
                for _ in range(8):
                    yield bytes(8 << 20)
                print("sent", flush=True)
                sys.stdin.readline()

            ObjectStore(sys.argv[1]).write_stream("a/b", parts())
        """
        fs = s3fs.S3FileSystem(endpoint_url=s3.endpoint, key=s3.access_key, secret=s3.secret_key)

        def uploads() -> list[str]:
            found = fs.call_s3("list_multipart_uploads", Bucket=s3.bucket).get("Uploads", ())
            return [u["Key"] for u in found if f"{s3.bucket}/{u['Key']}".startswith(bucket.removeprefix("s3://"))]

        with start_python(code, store.url) as writer:
            assert writer.stdout and writer.stdout.readline() == "sent\n"
            writer.kill()
        assert len(uploads()) == 1 and store.list() == []
        store.probe()  # the writer may be alive, as far as anyone knows
        assert len(uploads()) == 1
        store.child("else").sweep(timedelta())
        assert len(uploads()) == 1
        store.sweep(timedelta())
        assert uploads() == []

    def test_options_serve_as_well_as_the_environment(
        self, s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        options = {"endpoint": s3.endpoint, "access_key_id": s3.access_key, "secret_access_key": s3.secret_key}
        store = ObjectStore(bucket, options | {"client_options": {"timeout": 20}})
        store.put("a", b"1")
        assert store.get("a") == b"1" and set(options) == {"endpoint", "access_key_id", "secret_access_key"}

    def test_wrong_credentials_are_named_but_not_shown(self, bucket: str) -> None:
        store = ObjectStore(bucket, {"secret_access_key": "not-to-be-seen"})
        with pytest.raises(StoreUnwritable, match=rf"{bucket}.*403.*expected credentials") as caught:
            store.probe()
        assert "not-to-be-seen" not in str(caught.value) + repr(caught.value.__cause__) + repr(store)

    def test_a_server_that_is_not_there_is_unavailable(self, bucket: str) -> None:
        store = ObjectStore(bucket, {"endpoint": "http://127.0.0.1:1", "retry_config": {"max_retries": 1}})
        for call in (store.probe, store.list, lambda: store.put("a", b""), lambda: store.exists("a")):
            with pytest.raises(StoreUnavailable, match=rf"{bucket}.*127\.0\.0\.1:1/"):
                call()

    @pytest.mark.parametrize("fault", ["500 after", "close after", "503 before", "close before"])
    @pytest.mark.parametrize("size", [10, 3 << 20])
    def test_a_lost_answer_to_a_create_is_no_lost_race(
        self, bucket: str, faulty_s3: FaultyProxy, fault: str, size: int
    ) -> None:
        """The client repeats the request, and finds what it has itself created."""
        store = ObjectStore(bucket, {"endpoint": faulty_s3.url})
        faulty_s3.faults = {"PUT": [fault]}
        store.put("a", bytes(size))
        assert faulty_s3.seen.count("PUT") == 2
        assert store.get("a") == bytes(size)
        with pytest.raises(ObjectExists):
            store.put("a", bytes(size))

    @pytest.mark.parametrize("fault", ["503 before", "close before", "close within"])
    def test_a_read_survives_a_broken_connection(self, bucket: str, faulty_s3: FaultyProxy, fault: str) -> None:
        store = ObjectStore(bucket, {"endpoint": faulty_s3.url})
        data = os.urandom(3 << 20)
        ref = store.write("objects", data)
        faulty_s3.faults = {"GET": [fault, fault]}
        assert store.read(ref) == data
        assert faulty_s3.seen.count("GET") == 3

    @pytest.mark.parametrize("fault", ["503 before", "close before"])
    def test_a_server_that_goes_on_failing_is_unavailable(
        self, bucket: str, faulty_s3: FaultyProxy, fault: str
    ) -> None:
        store = ObjectStore(bucket, {"endpoint": faulty_s3.url, "retry_config": {"max_retries": 2}})
        faulty_s3.faults = {method: [fault] * 3 for method in ("PUT", "GET", "HEAD")}
        for call in (lambda: store.put("a", b""), lambda: store.get("a"), lambda: store.size("a")):
            with pytest.raises(StoreUnavailable, match=rf"{bucket}: cannot .* 'a'.*try again"):
                call()
        store.put("a", b"")

    def test_a_put_outlasts_an_outage_of_the_server(self) -> None:
        with s3_server() as server, ThreadPoolExecutor(1) as pool:
            options = {"access_key_id": server.access_key, "secret_access_key": server.secret_key}
            store = ObjectStore(f"s3://{server.bucket}", {"endpoint": server.endpoint} | options)
            server.kill()
            put = pool.submit(store.put, "a", b"through")
            server.restart()
            put.result()
            assert store.get("a") == b"through"

    def test_the_probe_refuses_a_server_without_conditional_requests(self, bucket: str, faulty_s3: FaultyProxy) -> None:
        faulty_s3.conditional = False
        with pytest.raises(StoreError, match=r"a second create of the same key succeeded.*If-None-Match"):
            ObjectStore(bucket, {"endpoint": faulty_s3.url}).probe()

    def test_a_forked_process_is_told_instead_of_hanging(self, store: ObjectStore) -> None:
        code = """if True:
            import os, signal, sys
            from fedflow.errors import StoreError
            from fedflow.store.objects import ObjectStore

            ObjectStore(sys.argv[1]).put("parent", b"")
            if os.fork():
                sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
            signal.alarm(60)
            try:
                ObjectStore(sys.argv[1]).put("child", b"")
            except StoreError as exc:
                print(exc)
        """
        with start_python(code, store.url) as process:
            said = process.communicate()[0]
        assert (process.returncode, store.list()) == (0, ["parent"])
        assert re.search("forked.*expected a process started by 'spawn'", said)


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to a real server, and does to the next of a method what `faults` says."""

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), FaultyHandler)
        self.target = urlsplit(target).netloc
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults: dict[str, list[str]] = {}
        self.seen: list[str] = []
        self.conditional = True


class FaultyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.seen.append(self.command)
        if "if-none-match" in self.headers and not self.server.conditional:
            self.answer(200, [("etag", '"1"')], self.put_anyway(body))
            return
        waiting = self.server.faults.get(self.command)
        fault, _, when = (waiting.pop(0) if waiting else "").partition(" ")
        status, headers, answer = (0, [], b"") if when == "before" else self.pass_on(body)
        if fault == "close" and when != "within":
            self.close_connection = True
            return
        if fault.isdigit():
            status, headers, answer = int(fault), [], b""
        self.answer(status, headers, answer, len(answer) // 2 if when == "within" else None)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_request

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])
        self.close_connection = cut is not None

    def put_anyway(self, body: bytes) -> bytes:
        """As a server that does not know the condition. (Signed as it is, the request can't be passed on without it.)"""
        _, bucket, key = self.path.split("/", 2)
        obstore.put(from_url(f"s3://{bucket}", client_options={"allow_http": True}), key, body)
        return b""

    def pass_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.target)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        with connection.getresponse() as response:
            headers = [item for item in response.getheaders() if item[0].lower() != "transfer-encoding"]
            return response.status, headers, response.read()

    def log_message(self, *args: Any) -> None:
        """Silent."""


@pytest.fixture
def faulty_s3(s3: Any) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3.endpoint) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield proxy
        proxy.shutdown()


# --- URLs, references, imports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "options", "text"),
    [
        ("s3://user:hunter2@bucket/a", None, "found a login in the URL"),
        ("ftp://user:hunter2@127.0.0.1:1/a", None, "ftp://127.0.0.1:1/a"),
        ("sftp2://user:hunter2@host/a", {"password": "hunter2"}, "sftp2://host/a.*Protocol not known"),
        ("s3://bucket/a", {"secret_access_key": "hunter2", "hunter": "x"}, "'hunter' is not valid"),
        ("az://container/a", {"account_key": "hunter2"}, "az://container/a.*[Aa]ccount"),
        ("s3://bucket/../a", None, r"s3://bucket/\.\./a.*'\.\.'"),
        ("memory://a//b", None, "memory://a//b"),
        ("/somewhere", {"a": 1}, r"options \['a'\]"),
        ("", None, "expected the path of a directory"),
        ("file://", None, "expected the path of a directory"),
    ],
)
def test_an_impossible_url_is_an_error_that_shows_no_password(url: str, options: Any, text: str) -> None:
    with pytest.raises(StoreError, match=text) as caught:
        ObjectStore(url, options)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("S3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/a b#c?d%20e", "s3://bucket/a b#c?d%20e"),
        ("gs://bucket/a", "gs://bucket/a"),
        ("abfss://container@account.dfs.core.windows.net/a", "abfss://container@account.dfs.core.windows.net/a"),
        ("memory://name/", "memory://name"),
    ],
)
def test_a_url_has_one_form(url: str, shown: str) -> None:
    assert (ObjectStore(url).url, repr(ObjectStore(url))) == (shown, f"ObjectStore({shown!r})")


def test_a_cloud_url_is_literal(bucket: str) -> None:
    """What the URL of a child says is where its objects are, whatever characters it has."""
    odd = ObjectStore(bucket).child("a b#c?d%20e%2Ff/ä")
    odd.put("x", b"1")
    assert ObjectStore(odd.url).get("x") == b"1"
    assert ObjectStore(bucket).list() == ["a b#c?d%20e%2Ff/ä/x"]


def test_a_digest_is_that_of_the_blake3_test_vectors() -> None:
    """github.com/BLAKE3-team/BLAKE3, test_vectors.json: input bytes 0, 1, ..., 250, 0, 1, ..."""
    expected = {
        0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
        1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
        1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
    }
    for length, found in expected.items():
        assert digest(bytes(number % 251 for number in range(length))) == f"blake3:{found}"


@pytest.mark.parametrize(
    ("size", "chunks"), [(0, 0), (1, 0), (CHUNK_SIZE, 0), (CHUNK_SIZE + 1, 2), (2 * CHUNK_SIZE, 2)]
)
def test_a_reference_has_a_digest_a_chunk_where_there_are_several(size: int, chunks: int) -> None:
    data = bytes(size)
    ref = ObjectRef.of("a/b", memoryview(data))
    hashed = b"".join(bytes.fromhex(chunk.removeprefix("blake3:")) for chunk in ref.chunks) or data
    assert (ref.key, ref.size, ref.digest, len(ref.chunks)) == ("a/b", size, digest(hashed), chunks)
    assert all(found == digest(data[i * CHUNK_SIZE : (i + 1) * CHUNK_SIZE]) for i, found in enumerate(ref.chunks))
    assert ObjectRef.from_json(json.loads(json.dumps(ref.to_json()))) == ref


GOOD = ObjectRef.of("a/b", bytes(3500), 1000).to_json()


@pytest.mark.parametrize(
    "change",
    [
        *({"key": key} for key in ("../a", "/a", "", 1, None, "s3://b/a")),
        *({"size": size} for size in (-1, 1.0, True, "1", None, 4001, 3000, 10)),
        *({"digest": found} for found in ("", "sha256:00", "blake3:00", "blake3:" + "G" * 64, None)),
        *({"chunk_size": size} for size in (0, -1, 1.0, True, None, 2000)),
        *({"chunks": chunks} for chunks in ([], None, 1, GOOD["chunks"][:3], ["a"] * 4, [None] * 4, "abcd")),
        {"more": 1},
    ],
    ids=str,
)
def test_a_malformed_reference_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="not a reference to an object"):
        ObjectRef.from_json(GOOD | change)


@pytest.mark.parametrize("name", GOOD)
def test_a_reference_with_a_field_missing_is_refused(name: str) -> None:
    with pytest.raises(StoreError, match="expected the fields key, size, digest, chunk_size, chunks"):
        ObjectRef.from_json({field: value for field, value in GOOD.items() if field != name})


def test_a_store_does_not_go_into_a_pickle() -> None:
    import pickle

    with pytest.raises(TypeError, match="give the other process its URL"):
        pickle.dumps(ObjectStore("memory://a"))


def test_the_cloud_client_is_imported_for_cloud_urls_only() -> None:
    code = """if True:
        import sys
        from fedflow.store.objects import ObjectStore
        store = ObjectStore("memory://a")
        store.probe()
        assert not {"obstore", "s3fs", "botocore", "torch", "prefect"} & set(sys.modules)
        sys.modules["obstore"] = sys.modules["obstore.store"] = None  # as if it were not installed
        ObjectStore("s3://bucket")
    """
    with start_python(code, stderr=subprocess.PIPE) as process:
        said = process.communicate()[1]
    assert "StoreError: s3://bucket: found no package obstore, expected it: pip install 'fedflow[s3]'" in said
