"""Sites behind the proxy: with its credentials a site does its own work, and can neither see nor touch another's."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import yaml
from obstore.exceptions import BaseError
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events import Event
from prefect.events.clients import PrefectEventsClient
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_SSL_CERT_FILE,
    PREFECT_API_URL,
    PREFECT_CLIENT_CUSTOM_HEADERS,
    temporary_settings,
)
from prefect.states import Scheduled
from websockets.exceptions import InvalidStatus

from fedflow.environments.prod import ProdEnv
from fedflow.prefect.api import absence, connect, find_runs, run_tag
from fedflow.prefect.dispatch import AGGREGATION_FLOW
from fedflow.prefect.starting import examine
from fedflow.prefect.worker import CoordinatorWorker, command, credential
from fedflow.recipe import Federation, FederationSite, SiteConfig
from fedflow.store.records import utc_now
from tests import builders
from tests.compose import SECRET, ComposeStore, Gate, Proxy
from tests.deployed import ROOT, Worker, awaited
from tests.servers import PostgresServer, PrefectServer, prefect_server

pytestmark = [pytest.mark.proxy, pytest.mark.timeout(600)]

API = "operator:its-own-secret"
SITES = ["site-1", "site-2"]
REGION = "north"
WORKPLACES = [*SITES, REGION]
RIGHTS = {  # of who aggregates, as docs/deployment.md has them
    "site-2": ["Read:fedflow/*", "List:fedflow/*"],
    REGION: [
        f"{may}:fedflow/{part}/*" for may in ("Read", "List") for part in ("server", "sites/site-1", "sites/site-2")
    ],
}


@dataclass
class Ground:
    """The servers, and a training of both sites that has been held through the proxy."""

    home: Path
    prefect: PrefectServer
    gate: Gate
    store: ComposeStore
    proxy: Proxy
    env: ProdEnv
    client: SyncPrefectClient
    run: str
    digest: str
    logs: Mapping[str, str]

    def flow_run(self, site: str, round: int = 0) -> FlowRun:
        """Of that site in that training."""
        return next(r for r in self.runs() if {f"site:{site}", f"round:{round}"} <= set(r.tags))

    def runs(self) -> list[FlowRun]:
        nonce = self.env.attach(self.run).journal.record().nonce
        return find_runs(self.client, run_tag(nonce), states=list(StateType))

    def as_(self, site: str, key: str | None = None) -> httpx.Client:
        """A client with the site's credential."""
        auth = (site, key or self.proxy.keys[site])
        return httpx.Client(
            base_url=f"{self.proxy.url}/sites/api",
            auth=auth,
            verify=ssl.create_default_context(cafile=self.proxy.authority),
        )


@pytest.fixture(scope="module")
def ground(postgresql: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    home, before = tmp_path_factory.mktemp("proxied"), dict(os.environ)
    for folder in ("store", "gate", "proxy"):
        (home / folder).mkdir()
    with ExitStack() as stack:
        prefect = stack.enter_context(prefect_server(postgresql.new_database(), API))
        gate = stack.enter_context(Gate(home / "gate", prefect))
        store = stack.enter_context(ComposeStore(home / "store", WORKPLACES, RIGHTS))
        proxy = stack.enter_context(Proxy(home / "proxy", prefect, gate, store, WORKPLACES))
        trusted = {"PREFECT_API_SSL_CERT_FILE": str(proxy.authority), "SSL_CERT_FILE": str(proxy.authority)}

        def settings(who: str, url: str, auth: str) -> dict[str, str]:
            key = {"AWS_ACCESS_KEY_ID": who, "AWS_SECRET_ACCESS_KEY": SECRET}
            own = {
                "PREFECT_HOME": str(home / f"{who}-home"),
                "PREFECT_WORKER_QUERY_SECONDS": "1",
                "PYTHONPATH": str(ROOT),
            }
            return {**trusted, **key, **own, "PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": auth}

        options = {"endpoint": proxy.store_url, "region": "us-east-1"}
        federation = Federation(
            sites=SITES, regions=[FederationSite(name=REGION)], store="s3://fedflow", store_options=options
        )  # type: ignore[arg-type]
        coordinator = settings("coordinator", f"{proxy.url}/api", API)
        workers = [
            Worker(
                "coordinator",
                command(federation.coordinator_pool, "coordinator", CoordinatorWorker.type),
                {**os.environ, **coordinator},
                home / "coordinator.log",
            )
        ]
        for name in WORKPLACES:
            config = home / f"{name}.yaml"
            given = {"name": name, "store": "s3://fedflow", "store_options": dict(federation.store_options)}
            config.write_text(yaml.safe_dump({**given, "state": str(home / name), "allowed_imports": ["*"]}))
            start = [sys.executable, "-m", "fedflow.cli", "site", "start", "--config", str(config)]
            environment = {**os.environ, **settings(name, f"{proxy.url}/sites/api", f"{name}:{proxy.keys[name]}")}
            workers.append(Worker(name, start, environment, home / f"{name}.log"))
        stack.callback(lambda: (os.environ.clear(), os.environ.update(before)))
        os.environ.update({key: coordinator[key] for key in coordinator if key.startswith(("AWS", "SSL"))})
        stack.enter_context(
            temporary_settings(
                {
                    PREFECT_API_URL: f"{proxy.url}/api",
                    PREFECT_API_AUTH_STRING: API,
                    PREFECT_API_SSL_CERT_FILE: str(proxy.authority),
                }
            )
        )
        env = ProdEnv(federation, home=home)
        env.deploy()
        for worker in workers:
            stack.callback(worker.lose)
            worker.start()
        client = stack.enter_context(connect())
        for pool in (federation.coordinator_pool, *WORKPLACES):
            awaited(lambda pool=pool: absence(client, pool) is None, f"a worker on {pool}", 120)  # type: ignore[misc]
        run = env.execute(builders.recipe(algorithm={"kind": "scaffold"}), run_id="proxied")
        digest = run.result(300).model_digest
        logs = {worker.name: worker.log.read_text() for worker in workers}
        yield Ground(home, prefect, gate, store, proxy, env, client, run.id, digest, logs)


def test_a_training_through_the_proxy_has_the_same_bytes(ground: Ground) -> None:
    """With a state at the sites. Each did its work in its own flow runs, whose logs arrived; nothing it needs was refused."""
    reference = builders.run(builders.recipe(algorithm={"kind": "scaffold"}), sites=SITES)
    assert ground.digest == builders.head(reference).model_digest
    sites = [run for run in ground.runs() if run.deployment_id and any(tag.startswith("site:") for tag in run.tags)]
    assert len(sites) == 4 and {run.state_type for run in sites} == {StateType.COMPLETED}
    for site in SITES:
        assert any("steps on" in line for line in ground.env.attach(ground.run).logs(site)), site
        assert "Traceback" not in ground.logs[site], ground.logs[site]


@pytest.mark.parametrize(
    "schedule",
    [{"kind": "swarm", "aggregators": ["site-2"]}, {"kind": "tree", "regions": {REGION: SITES}}],
    ids=lambda s: s["kind"],
)
def test_a_round_that_is_aggregated_elsewhere_has_the_same_bytes(ground: Ground, schedule: Any) -> None:
    """At a site, and at a region, by workers that have the credentials of a workplace and no more."""
    recipe = builders.recipe(schedule=schedule, rounds=1)
    run = ground.env.execute(recipe, run_id=schedule["kind"])
    run.result(300)
    assert builders.bits(run.journal) == builders.bits(builders.run(recipe, sites=SITES))
    who = {"swarm": "site-2", "tree": REGION}[schedule["kind"]]
    assert run.journal.store.list(f"sites/{who}/{run.id}/aggregated")
    done = find_runs(ground.client, run_tag(run.journal.record().nonce), states=list(StateType))
    assert {r.state_type for r in done} == {StateType.COMPLETED}


# -- routes ------------------------------------------------------------------------------------------------------------
LOG = {"name": "a", "level": 20, "message": "a line", "timestamp": "2026-01-01T00:00:00Z"}
STATE = {"state": {"type": "COMPLETED"}}

OPEN = [
    *(("GET", route) for route in ("/health", "/ready", "/hello", "/admin/version")),
    ("GET", "/work_pools/{own_pool}"),
    ("POST", "/work_pools/{own_pool}/get_scheduled_flow_runs", {}),
    ("POST", "/work_pools/{own_pool}/workers/heartbeat", {"name": "worker"}),
    ("POST", "/work_pools/{own_pool}/workers/filter", {}),
    ("GET", "/flow_runs/{own}"),
    ("GET", "/flow_runs/{own_share}"),
    ("GET", "/flows/{aggregation_flow}"),
    ("POST", "/flow_runs/{own}/set_state", STATE),
    ("GET", "/flow_run_states/?flow_run_id={own}"),
    ("GET", "/flows/{flow}"),
    ("POST", "/logs/", [{**LOG, "flow_run_id": "{own}"}]),
]

CLOSED = [
    # Another site's, and the coordinator's.
    *(("GET", f"/flow_runs/{{{run}}}") for run in ("other", "other_share", "round", "unknown")),
    *(("POST", f"/flow_runs/{{{run}}}/set_state", STATE) for run in ("other", "other_share", "round")),
    ("GET", "/flow_run_states/?flow_run_id={other}"),
    ("GET", "/flow_run_states/?flow_run_id={other}&flow_run_id={own}"),
    ("GET", "/flow_run_states/"),
    ("GET", "/work_pools/{other_pool}"),
    ("POST", "/work_pools/{other_pool}/get_scheduled_flow_runs", {}),
    ("POST", "/work_pools/{other_pool}/workers/heartbeat", {"name": "forged"}),
    ("POST", "/work_pools/{other_pool}/workers/filter", {}),
    ("GET", "/work_pools/north"),
    ("GET", "/flows/{training_flow}"),
    ("POST", "/logs/", [{**LOG, "flow_run_id": "{own}"}, {**LOG, "flow_run_id": "{other}"}]),
    # What asks about all, what makes, what changes.
    *(
        ("POST", f"/{what}/filter", {})
        for what in ("flow_runs", "task_runs", "logs", "deployments", "work_pools", "artifacts", "events", "flows")
    ),
    *(
        ("POST", f"/{what}/", {})
        for what in ("flow_runs", "task_runs", "deployments", "flows", "work_pools", "artifacts")
    ),
    ("POST", "/flow_runs/count", {}),
    ("POST", "/flow_runs/{own}/resume", {}),
    ("PATCH", "/flow_runs/{own}", {"tags": ["site:site-2"]}),
    ("DELETE", "/flow_runs/{own}"),
    ("GET", "/flow_runs/{own}/graph"),
    ("POST", "/task_runs/{task}/set_state", STATE),
    ("GET", "/task_runs/{task}"),
    ("PATCH", "/work_pools/{own_pool}", {"base_job_template": {}}),
    ("DELETE", "/work_pools/{own_pool}"),
    ("POST", "/work_pools/{own_pool}/queues/filter", {}),
    ("POST", "/work_pools/filter", {}),
    ("GET", "/deployments/{deployment}"),
    ("PATCH", "/deployments/{deployment}", {}),
    ("POST", "/deployments/{deployment}/create_flow_run", {}),
    ("GET", "/block_documents/name/secret"),
    ("POST", "/block_documents/", {}),
    ("POST", "/variables/", {}),
    ("POST", "/automations/", {}),
    ("POST", "/events", []),
    ("GET", "/admin/settings"),
    ("POST", "/admin/database/clear", {}),
    # Ways around the list.
    ("GET", "/flow_runs/{own}/../{other}"),
    ("GET", "/flow_runs/{own}/%2e%2e/{other}"),
    ("GET", "/flow_runs/{own}%2f..%2f{other}"),
    ("GET", "//flow_runs/{other}"),
    ("GET", "/work_pools/{own_pool}%2f..%2f{other_pool}"),
]


@pytest.fixture(scope="module")
def names(ground: Ground) -> dict[str, str]:
    """What the routes name, as {…} in them, where the site is site-1."""
    own, other = ground.flow_run("site-1"), ground.flow_run("site-2")
    held = next(run for run in ground.runs() if run.name.endswith("round 000"))
    assert own.parent_task_run_id and own.deployment_id and other.deployment_id
    shares = {site: share_at(ground.client, site) for site in (*SITES, REGION)}
    return {
        "own": str(own.id),
        "other": str(other.id),
        "round": str(held.id),
        "unknown": str(uuid4()),
        "task": str(own.parent_task_run_id),
        "own_share": str(shares["site-1"].id),
        "other_share": str(shares["site-2"].id),
        "regions_share": str(shares[REGION].id),
        "aggregation_flow": str(shares["site-1"].flow_id),
        "own_pool": "site-1",
        "other_pool": "site-2",
        "deployment": str(own.deployment_id),
        "flow": str(own.flow_id),
        "training_flow": str(held.flow_id),
    }


def share_at(client: SyncPrefectClient, workplace: str) -> FlowRun:
    """A flow run of the aggregation there, of tomorrow: no worker takes it."""
    deployment = client.read_deployment_by_name(f"{AGGREGATION_FLOW}/{workplace}")
    tomorrow = Scheduled(scheduled_time=utc_now() + timedelta(days=1))
    given = {"run": "r", "round": 0, "phase": "train", "opening": 1, "share": "round", "workplace": workplace}
    return client.create_flow_run_from_deployment(deployment.id, parameters=given, state=tomorrow)


def ask(client: httpx.Client, names: Mapping[str, str], method: str, route: str, body: Any = None) -> httpx.Response:
    for name, value in names.items():
        route = route.replace(f"{{{name}}}", value)
        body = json.loads(json.dumps(body).replace(f"{{{name}}}", value))
    return client.request(method, f"{client.base_url}{route}".replace("/api//", "/api/", 1), json=body)


@pytest.mark.parametrize("route", OPEN, ids=lambda r: " ".join(r[:2]))
def test_a_site_reaches_what_it_needs(ground: Ground, names: dict[str, str], route: Any) -> None:
    with ground.as_("site-1") as client:
        assert ask(client, names, *route).is_success, ask(client, names, *route).text


@pytest.mark.parametrize("route", CLOSED, ids=lambda r: " ".join(r[:2]))
def test_a_site_reaches_nothing_else(ground: Ground, names: dict[str, str], route: Any) -> None:
    """Not without a credential either, nor with a wrong one, nor at the operators' address."""
    with ground.as_("site-1") as client:
        answer = ask(client, names, *route)
        assert answer.status_code == 403, answer.text
        direct = client.request(route[0], f"{ground.proxy.url}/api/flow_runs/{names['own']}")
        assert direct.status_code in (401, 405)


@pytest.mark.parametrize("route", OPEN, ids=lambda r: " ".join(r[:2]))
def test_nobody_reaches_anything_without_a_credential(ground: Ground, names: dict[str, str], route: Any) -> None:
    with ground.as_("site-1", ground.proxy.keys["site-2"]) as wrong:
        assert ask(wrong, names, *route).status_code == 401
        assert (
            wrong.request("GET", f"{ground.proxy.url}/sites/api/flow_runs/{names['own']}", auth=None).status_code == 401
        )


def test_a_regional_aggregator_reaches_its_own_pool_and_flow_runs(ground: Ground, names: dict[str, str]) -> None:
    with ground.as_(REGION) as client:
        for route, answer in {
            f"/work_pools/{REGION}": 200,
            "/flow_runs/{regions_share}": 200,
            "/flows/{aggregation_flow}": 200,
            "/work_pools/site-1": 403,
            "/flow_runs/{own}": 403,
            "/flow_runs/{own_share}": 403,
        }.items():
            assert ask(client, names, "GET", route).status_code == answer, route


def test_a_worker_is_told_of_another_one_of_its_site(ground: Ground, tmp_path: Path) -> None:
    """Through the proxy, as its start asks; of a work pool that is not its site's, that it is none."""
    options = {
        **ground.env.federation.store_options,
        "access_key_id": "site-1",
        "secret_access_key": SECRET,
        "client_options": {"root_certificate": ground.proxy.authority.read_text()},
    }
    given: dict[str, Any] = {
        "name": "site-1",
        "store": "s3://fedflow",
        "store_options": options,
        "state": str(tmp_path / "state"),
        "api_url": f"{ground.proxy.url}/sites/api",
    }
    ground.client.send_worker_heartbeat("site-1", "site-1@elsewhere", heartbeat_interval_seconds=30)
    with as_a_site(ground, "site-1"):
        said = [problem.text for problem in examine(SiteConfig.load(given))]
        assert [text for text in said if "another worker of site-1 on elsewhere" in text], said
        (foreign,) = [p for p in examine(SiteConfig.load(given | {"pool": "site-2"})) if p.text.startswith("api_url")]
        assert foreign.then == "waits" and "with 'site-2' as the work pool of site-1" in foreign.text


def test_lines_of_a_log_name_nothing_but_their_flow_run(ground: Ground, names: dict[str, str]) -> None:
    text = f"a line {uuid4()}"
    line = {**LOG, "message": text, "flow_run_id": names["own"], "task_run_id": names["task"]}
    with ground.as_("site-1") as client:
        assert client.post("/logs/", json=[line]).status_code == 201
        assert client.post("/logs/", json=[LOG]).status_code == 422
        assert client.post("/logs/", json={}).status_code == 422
    found = ground.client.request("POST", "/logs/filter", json={"limit": 200, "sort": "TIMESTAMP_ASC"}).json()
    (kept,) = [log for log in found if log["message"] == text]
    assert (kept["flow_run_id"], kept["task_run_id"]) == (names["own"], None)


def test_events_are_about_a_sites_own_flow_runs_and_nobody_listens(ground: Ground, names: dict[str, str]) -> None:
    """Others are dropped, those of tasks too: they are what the server knows of a task."""
    mark = str(uuid4())

    def event(kind: str, about: str) -> Event:
        resource = {"prefect.resource.id": about, "prefect.resource.name": mark}
        related = [{"prefect.resource.id": f"prefect.flow-run.{names['other']}", "prefect.resource.role": "flow-run"}]
        return Event(event=kind, resource=resource, related=related)  # type: ignore[arg-type]

    heartbeat = "prefect.flow-run.heartbeat"
    sent = [
        event(heartbeat, f"prefect.flow-run.{names['other']}"),
        event(heartbeat, f"prefect.flow-run.{names['round']}"),
        event("prefect.task-run.Completed", f"prefect.task-run.{names['task']}"),
        event("prefect.task-run.Completed", f"prefect.flow-run.{names['own']}"),
        event("prefect.worker.started", "prefect.worker.fedflow-site.site-2"),
        event(heartbeat, f"prefect.flow-run.{names['own']}"),
    ]

    async def send() -> None:
        async with PrefectEventsClient() as client:
            for one in sent:
                await client.emit(one)

    def arrived() -> list[dict[str, Any]]:
        wanted = {"filter": {"resource": {"labels": {"prefect.resource.name": [mark]}}}}
        return list(ground.client.request("POST", "/events/filter", json=wanted).json()["events"])

    with as_a_site(ground, "site-1"):
        asyncio.run(send())
        for out in ("/events/out", "/logs/out", "/work_pools/site-1/workers/connect"):
            with pytest.raises(InvalidStatus, match="403"):
                asyncio.run(listen(ground, out))
    awaited(lambda: bool(arrived()), "the site's event arrives", 60)
    (found,) = arrived()  # it was sent last
    assert found["resource"]["prefect.resource.id"] == f"prefect.flow-run.{names['own']}" and found["related"] == []


@contextmanager
def as_a_site(ground: Ground, site: str) -> Iterator[None]:
    """Prefect's settings as `fedflow site start` makes them."""
    url = f"{ground.proxy.url}/sites/api"
    with temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: f"{site}:{ground.proxy.keys[site]}"}):
        headers = json.loads(credential()["PREFECT_CLIENT_CUSTOM_HEADERS"])
        with temporary_settings({PREFECT_CLIENT_CUSTOM_HEADERS: headers}):
            yield


async def listen(ground: Ground, route: str) -> None:
    from prefect._internal.websockets import websocket_connect

    async with websocket_connect(
        f"{ground.proxy.url.replace('http', 'ws')}/sites/api{route}", subprotocols=["prefect"]
    ):
        pass


def test_a_site_is_asked_to_come_back_while_nobody_knows_what_is_its(ground: Ground, names: dict[str, str]) -> None:
    """503, which Prefect's client tries again, and no other answer: a training may end in that moment."""
    with ground.as_("site-1") as client:
        ground.gate.kill()
        try:
            for method, route, *body in OPEN:
                if "{" in route or "logs" in route:
                    assert ask(client, names, method, route, *body).status_code in (502, 503), route
        finally:
            ground.gate.start()
        assert client.get(f"/flow_runs/{names['own']}").status_code == 200


# -- the store ---------------------------------------------------------------------------------------------------------
def test_a_site_leaves_word_of_its_start_and_reads_its_federations(ground: Ground) -> None:
    """Its record is written over at each start; the federation's is written by `fedflow deploy`."""
    store = ground.store.as_("site-1")
    started = bytes(store.get("sites/site-1/_start.json").bytes())
    assert json.loads(started)["site"] == "site-1"
    store.put("sites/site-1/_start.json", started)
    name = ground.env.federation.name
    assert json.loads(bytes(store.get(f"public/_federation/{name}.json").bytes()))["sites"] == [REGION, *SITES]
    assert [entry["path"] for part in store.list("public/_federation") for entry in part]
    for site in SITES:
        assert "the coordinator cannot be told" not in ground.logs[site] and "store:" not in ground.logs[site]


@pytest.mark.parametrize("key", ["own", "public"])
def test_a_site_reads_its_own_part_of_the_store(ground: Ground, key: str) -> None:
    prefix = {"own": f"sites/site-1/{ground.run}", "public": f"public/{ground.run}"}[key]
    store = ground.store.as_("site-1")
    found = [entry["path"] for part in store.list(prefix) for entry in part]
    assert found and bytes(store.get(found[0]).bytes())


@pytest.mark.parametrize("prefix", ["sites/site-2", "server", "sites", ""])
def test_other_parts_of_the_store_are_closed(ground: Ground, prefix: str) -> None:
    """Neither read nor listed nor written nor deleted, by whoever holds site-1's key."""
    site, everything = ground.store.as_("site-1"), ground.store.as_("coordinator")
    for_all = [e["path"] for part in everything.list(prefix or None) for e in part]
    others = [path for path in for_all if not path.startswith(("sites/site-1/", "public/"))]
    assert others
    for forbidden in (
        lambda: list(site.list(prefix or None)),
        lambda: site.get(others[0]),
        lambda: site.put(others[0], b"forged"),
        lambda: site.put(f"{others[0]}.new", b"forged", mode="create"),
        lambda: site.delete(others[0]),
        lambda: site.copy(others[0], "sites/site-1/stolen"),
    ):
        with pytest.raises(BaseError, match=r"AccessDenied|403"):
            forbidden()
