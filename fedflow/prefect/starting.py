"""What a site's worker looks at before it starts: its files, its key, the store, the Prefect server, others of its name."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from fedflow import __version__
from fedflow.engine.locks import holder
from fedflow.engine.starts import federations_of
from fedflow.errors import FedflowError, UserError, field_error
from fedflow.prefect.api import OUTAGE, WORKER_SILENCE
from fedflow.recipe import SiteConfig
from fedflow.store.objects import ObjectStore
from fedflow.store.records import utc_now
from fedflow.store.signing import Keys

__all__ = ["CLOCK", "Problem", "clock_problem", "examine", "worker_lock", "worker_name"]

CLOCK = 60  # seconds that a machine's clock may differ from the server's


@dataclass(frozen=True)
class Problem:
    """Something that is wrong at a site's start. then: whether the worker starts all the same, waits for it to pass, or stops."""

    text: str
    then: Literal["starts", "waits", "stops"] = "stops"


def worker_name(site: str) -> str:
    """A worker's, by which one on another machine is told apart."""
    return f"{site}@{socket.gethostname()}"


def worker_lock(api_url: str, pool: str) -> str:
    """Name of the lock that a site's worker holds on its machine."""
    return f"worker-{blake2b(f'{api_url} {pool}'.encode(), digest_size=12).hexdigest()}"


def clock_problem(date: str | None) -> str | None:
    """What is wrong with this machine's clock, by the `Date` of a server's answer; None where nothing is."""
    ahead = (utc_now() - parsedate_to_datetime(date)).total_seconds() if date else 0.0
    if abs(ahead) <= CLOCK:
        return None
    where = "ahead of" if ahead > 0 else "behind"
    return f"clock: found this machine's {abs(ahead):.0f} s {where} the Prefect server's, expected at most {CLOCK} s between them; set it"


def examine(config: SiteConfig) -> list[Problem]:
    """All that is wrong, in a few requests; empty where all is well."""
    return [*_files(config), *_store(config), *_server(config)]


def _files(config: SiteConfig) -> Iterator[Problem]:
    certificates = list(config.tls.model_dump().values()) if config.tls else []
    for field, paths in (("data", config.data), ("python_path", config.python_path), ("tls", certificates)):
        for path in paths:
            if (why := _unreadable(Path(path))) is not None:
                fix = f"let this worker's user read it, or correct the path: {why}"
                yield Problem(field_error(field, path, "a file or folder that can be read", fix))
    try:
        state = ObjectStore(config.state)
        state.put("_start", b"", mode="overwrite")
        state.delete("_start")
    except FedflowError as error:
        yield Problem(f"state: {error}")


def _unreadable(path: Path) -> str | None:
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        else:
            path.open("rb").close()
    except OSError as error:
        return error.strerror or repr(error)
    return None


def _store(config: SiteConfig) -> Iterator[Problem]:
    """The keys, as this site and its federation have them, and fedflow's version there."""
    try:
        keys = Keys.at(config)
    except UserError as error:
        yield Problem(str(error))
        return
    try:
        found = federations_of(ObjectStore(config.store, config.store_options), config.name)
    except FedflowError as error:
        yield Problem(f"store: {error}", "starts")
        return
    for federation in found:
        if (pinned := federation.keys.get(config.name)) is not None and pinned != keys.public:
            expected = f"{pinned}, which federation {federation.name} pins for {config.name}"
            fix = "have the coordinator pin this site's key (`fedflow site enroll` prints it), or restore the old one"
            yield Problem(field_error("key", keys.public, expected, fix))
        if config.coordinator_key is not None and federation.coordinator != config.coordinator_key:
            expected = f"{federation.coordinator}, with which federation {federation.name} signs"
            fix = "ask the coordinator over another channel which is right"
            yield Problem(field_error("coordinator_key", config.coordinator_key, expected, fix))
        if federation.fedflow != __version__:
            fix = "install the same everywhere"
            expected = f"{federation.fedflow}, the coordinator's"
            yield Problem(field_error("fedflow", __version__, expected, fix), "starts")


def _server(config: SiteConfig) -> Iterator[Problem]:
    url = config.api_url or PREFECT_API_URL.value()
    if not url:
        fix = "set it in the site's configuration, or PREFECT_API_URL"
        yield Problem(field_error("api_url", None, "the URL of the Prefect API", fix))
        return
    with (
        temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(sync_client=True) as client,
    ):
        try:
            client.read_work_pool(config.work_pool)
        except ObjectNotFound:
            fix = "have the coordinator run `fedflow deploy`"
            yield Problem(f"pool: found no work pool {config.work_pool!r} at {url}, expected one; {fix}", "starts")
        except PrefectHTTPStatusError as error:
            code, fix = error.response.status_code, "set PREFECT_API_AUTH_STRING, or correct it"
            if code == 403:  # a proxy's answer about a work pool that is not this site's, or not there yet
                fix = f"have the coordinator run `fedflow deploy`, with {config.work_pool!r} as the work pool of {config.name}"
            then: Literal["stops", "waits"] = "stops" if code == 401 else "waits"
            yield Problem(f"api_url: found the answer {code} at {url}, expected access; {fix}", then)
            return
        except OUTAGE as error:
            fix = f"start the server, or correct the URL ({error})"
            yield Problem(field_error("api_url", url, "a Prefect API that answers", fix), "waits")
            return
        with contextlib.suppress(*OUTAGE):
            if why := clock_problem(client.hello().headers.get("date")):
                yield Problem(why, "starts")
        yield from _others(client, config, url)


def _others(client: SyncPrefectClient, config: SiteConfig, url: str) -> Iterator[Problem]:
    """Workers of this site's name, on this machine or another."""
    fix = "a site has one worker: stop the other, or give this one a site of its own"
    if (process := holder(worker_lock(url, config.work_pool))) is not None:
        yield Problem(f"name: found another worker of {config.name} on this machine, process {process}; {fix}")
    with contextlib.suppress(*OUTAGE):
        for worker in client.read_workers_for_work_pool(config.work_pool):
            last = worker.last_heartbeat_time
            if worker.name != worker_name(config.name) and last is not None and abs(utc_now() - last) < WORKER_SILENCE:
                where = worker.name.partition("@")[2] or worker.name
                seen = f"on {where}, seen {(utc_now() - last).total_seconds():.0f} s ago"
                yield Problem(f"name: found another worker of {config.name} {seen}, expected none; {fix}", "waits")
