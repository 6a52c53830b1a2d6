"""What `deployments/compose.yaml` starts, as processes of this machine, from the files that are deployed: store, gate, proxy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import yaml
from obstore.exceptions import BaseError
from obstore.store import S3Store

import fedflow
from tests.servers import PrefectServer, Server, free_port

FILES = Path(fedflow.__file__).parent / "deployments"  # in the package: a wheel brings them along
PAGE = Path(__file__).parents[1] / "docs" / "deployment.md"
SITES = ("hospital-a", "hospital-b", "hospital-c")
SECRET = "a-secret"


def read(name: str) -> Any:
    """A YAML or JSON file among the deployment files."""
    return yaml.safe_load((FILES / name).read_text())


def services() -> dict[str, dict[str, Any]]:
    return dict(read("compose.yaml")["services"])


def weed_program() -> str:
    return str(Path(sys.executable).with_name("weed"))


def renamed(text: str, sites: Sequence[str]) -> str:
    """The example with other names of its sites."""
    for example, site in zip(SITES, sites, strict=False):
        text = text.replace(example, site)
    return text


class ComposeStore(Server):
    """SeaweedFS with the arguments of compose.yaml and the identities of s3.example.json, on free ports.

    rights: site -> what its key may besides
    """

    def __init__(
        self, directory: Path, sites: Sequence[str] = SITES, rights: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        identities = json.loads(renamed((FILES / "s3.example.json").read_text(), sites).replace("REPLACE", SECRET))
        for identity in identities["identities"]:
            identity["actions"] += (rights or {}).get(identity["name"], ())
        (directory / "s3.json").write_text(json.dumps(identities))
        self.port = free_port()
        changed = {
            "dir": directory / "data",
            "s3.config": directory / "s3.json",
            "s3.port": self.port,
            "s3.ip.bind": "127.0.0.1",
            "s3.localSocket": directory / "s3.sock",
            "filer.localSocket": directory / "filer.sock",
            **{f"{part}.port": free_port() for part in ("master", "volume", "filer")},
        }
        name, *given = services()["store"]["command"]
        kept = [option for option in given if option.lstrip("-").partition("=")[0] not in changed]
        (directory / "data").mkdir()
        command = [weed_program(), name, *kept, *(f"-{option}={value}" for option, value in changed.items())]
        super().__init__(directory, command, {"PATH": os.defpath, "HOME": str(directory)})

    def as_(self, name: str) -> S3Store:
        return S3Store(
            "fedflow",
            endpoint=f"http://127.0.0.1:{self.port}",
            access_key_id=name,
            secret_access_key=SECRET,
            region="us-east-1",
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )

    def answers(self) -> bool:
        try:
            self.as_("coordinator").put("server/r/state", b"secret")
            return True
        except BaseError:
            return False


class Gate(Server):
    """`fedflow gate` as compose.yaml starts it, on a free port."""

    def __init__(self, directory: Path, prefect: PrefectServer) -> None:
        self.port = free_port()
        _, *words = services()["gate"]["command"]
        changed = {"--host": "127.0.0.1", "--port": str(self.port)}
        given = [changed.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        command = [sys.executable, "-m", "fedflow.cli", *given]
        super().__init__(directory, command, {**os.environ, **prefect.env})

    def answers(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=2, trust_env=False).is_success
        return False


class Proxy(Server):
    """nginx with the file that is deployed, on free ports; with credentials made by the commands of docs/deployment.md.

    keys: site -> what follows its name and a colon in its credential
    """

    def __init__(
        self, directory: Path, prefect: PrefectServer, gate: Gate, store: ComposeStore, sites: Sequence[str]
    ) -> None:
        self.authority = directory / "ca.pem"
        self._certificate(directory / "tls")
        self.keys = _made_credentials(directory, prefect.env["PREFECT_API_AUTH_STRING"], sites)
        ports = {port: free_port() for port in (80, 443, 8333, 8080)}
        changed = {
            **{f"listen {port}": f"listen 127.0.0.1:{ports[port]}" for port in (80, 443, 8333)},
            "listen 127.0.0.1:8080": f"listen 127.0.0.1:{ports[8080]}",
            "/etc/nginx/secrets": str(directory / "secrets" / "proxy"),
            "/etc/nginx/tls": str(directory / "tls"),
            "/var/run/nginx.pid": str(directory / "nginx.pid"),
            "/dev/stderr": "stderr",
            "    resolver 127.0.0.11 valid=10s ipv6=off;\n": _folders(directory),
            "http://prefect:4200": prefect.ui_url,
            "http://gate:4300": f"http://127.0.0.1:{gate.port}",
            "http://store:8333": f"http://127.0.0.1:{store.port}",
        }
        conf = (FILES / "nginx.conf").read_text()
        for old, new in changed.items():
            assert old in conf, old
            conf = conf.replace(old, new)
        who = "user root;\n" if os.geteuid() == 0 else ""  # whose the folder is
        (directory / "nginx.conf").write_text(f"daemon off;\n{who}{conf}")
        self.url, self.store_url = f"https://127.0.0.1:{ports[443]}", f"https://127.0.0.1:{ports[8333]}"
        self._health = f"http://127.0.0.1:{ports[8080]}/"
        environment = {"PATH": f"{os.defpath}:/usr/sbin:/usr/local/sbin"}
        command = ["nginx", "-e", "stderr", "-p", str(directory), "-c", str(directory / "nginx.conf")]
        super().__init__(directory, command, environment)

    def answers(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(self._health, timeout=2, trust_env=False).status_code == 204
        return False

    def _certificate(self, folder: Path) -> None:
        """A certificate for 127.0.0.1, of an authority of our own: one that signs itself is not taken by all clients."""
        folder.mkdir()
        new = [
            "openssl",
            "req",
            "-x509",
            "-days",
            "2",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
        ]
        authority, key = str(self.authority), str(self.authority.with_name("ca.key"))
        extension = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=keyCertSign"]
        _run([*new, "-subj", "/CN=authority", "-keyout", key, "-out", authority, *extension], folder)
        files = ["-keyout", str(folder / "privkey.pem"), "-out", str(folder / "fullchain.pem")]
        extension = ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"]
        _run([*new, "-CA", authority, "-CAkey", key, "-subj", "/CN=127.0.0.1", *files, *extension], folder)


def _made_credentials(folder: Path, api: str, sites: Sequence[str]) -> dict[str, str]:
    """By the page's own commands, for the server and for each site; site -> its key."""
    page = PAGE.read_text()
    (server,) = re.findall(r"^\(\. \./\.env;.*?^\s.*?> secrets/proxy/api\.conf$", page, flags=re.M | re.S)
    (site,) = re.findall(r"^key=.*?(?=```)", page, flags=re.M | re.S)
    (folder / "secrets" / "proxy").mkdir(parents=True)
    (folder / ".env").write_text(f"PREFECT_API_AUTH_STRING={api}\n")
    _run(["bash", "-euc", server], folder)
    printed = [_run(["bash", "-euc", site.replace("hospital-a", name)], folder) for name in sites]
    return dict(line.partition("=")[2].strip().split(":") for line in printed)


def _run(command: Sequence[str], folder: Path) -> str:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def _folders(directory: Path) -> str:
    """Where nginx, as anybody, keeps what it receives."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return "".join(f"    {kind}_temp_path {directory}/{kind};\n" for kind in kinds)
