"""What a site's worker looks at before it starts, what it says, and what the coordinator sees of it."""

from __future__ import annotations

import json
import logging
import subprocess
from datetime import timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient

from fedflow.cli import main
from fedflow.engine import next_step, open_round, start_run
from fedflow.engine.locks import held
from fedflow.engine.starts import publish_federation, read_start, report_start
from fedflow.errors import QuorumLost
from fedflow.prefect.deploy import deploy_federation
from fedflow.prefect.dispatch import Collector, Origin, Watched
from fedflow.prefect.starting import clock_problem, examine, worker_lock
from fedflow.recipe import Federation, FederationSite, SiteConfig
from fedflow.store.objects import ObjectStore
from fedflow.store.records import FederationRecord, utc_now
from fedflow.store.signing import PrivateKey
from tests.builders import recipe
from tests.cli.project import command, environment
from tests.servers import PrefectServer

NOWHERE = "http://127.0.0.1:1/api"


def config(folder: Path, **fields: Any) -> SiteConfig:
    given = {"name": "site-1", "store": str(folder / "store"), "state": str(folder / "state"), "api_url": NOWHERE}
    return SiteConfig.load(given | fields)


def found(here: SiteConfig) -> dict[str, tuple[str, str]]:
    """Field -> what is wrong with it, and what then."""
    return {p.text.partition(":")[0]: (p.text, p.then) for p in examine(here)}


def test_data_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    here = config(tmp_path, data=[str(tmp_path / "images"), str(tmp_path / "table.csv")])
    text, then = found(here)["data"]
    assert then == "stops" and f"found '{tmp_path / 'table.csv'}'" in text and "No such file" in text
    (tmp_path / "table.csv").touch()
    assert "data" not in found(here)
    files = {field: str(tmp_path / f"{field}.pem") for field in ("authority", "certificate", "private_key")}
    told = [p.text for p in examine(config(tmp_path, tls=files)) if p.text.startswith("tls: found")]
    assert [path in text for path, text in zip(files.values(), told, strict=True)] == [True] * 3


def test_a_state_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    assert found(config(tmp_path))["state"][1] == "stops"


def test_a_server_that_does_not_answer_is_waited_for(tmp_path: Path) -> None:
    text, then = found(config(tmp_path))["api_url"]
    assert then == "waits" and NOWHERE in text and "a Prefect API that answers" in text
    text, then = found(config(tmp_path, api_url=None))["api_url"]
    assert then == "stops" and "found None" in text


def test_keys_other_than_the_federations_are_named_on_both_sides(tmp_path: Path) -> None:
    """The site's own, and the coordinator's that it pins; a federation of other sites says nothing."""
    names = ("mine", "other", "coordinator")
    mine, other, coordinator = (PrivateKey.create(tmp_path / name).public for name in names)
    store = ObjectStore(str(tmp_path / "store"))
    here = config(tmp_path, key=str(tmp_path / "mine"), coordinator_key=coordinator)
    publish_federation(store, Federation(sites=[FederationSite(name="site-2", key=other)], name="elsewhere"))
    assert found(here).keys() == {"api_url"}
    sites = [FederationSite(name="site-1", key=mine)]
    publish_federation(store, Federation(sites=sites, coordinator_key=coordinator))
    assert found(here).keys() == {"api_url"}
    publish_federation(store, Federation(sites=[FederationSite(name="site-1", key=other)], coordinator_key=other))
    seen = found(here)
    assert seen["key"][1] == "stops" and other in seen["key"][0] and mine in seen["key"][0]
    assert seen["coordinator_key"][1] == "stops" and coordinator in seen["coordinator_key"][0]
    assert "found None" in found(config(tmp_path))["key"][0]
    regional = Federation(
        sites=["site-2"], regions=[FederationSite(name="site-1", key=other)], coordinator_key=coordinator
    )  # type: ignore[list-item]
    publish_federation(store, regional)
    assert found(here).keys() == {"api_url", "key"}
    (tmp_path / "mine").unlink()
    assert "fedflow site enroll" in found(here)["key"][0]


def test_another_version_of_fedflow_is_said_and_the_worker_starts(tmp_path: Path) -> None:
    record = FederationRecord(name="f", at=utc_now(), fedflow="0.0.0", sites=["site-1"])
    ObjectStore(str(tmp_path / "store")).put("public/_federation/f.json", record.to_bytes())
    text, then = found(config(tmp_path))["fedflow"]
    assert then == "starts" and "'0.0.0'" not in text and "0.0.0, the coordinator's" in text


@pytest.mark.parametrize(("hours", "said"), [(1, " s behind the"), (-1, " s ahead of the"), (0, None)])
def test_a_clock_that_is_wrong_is_said(hours: int, said: str | None) -> None:
    problem = clock_problem(format_datetime(utc_now() + timedelta(hours=hours), usegmt=True))
    assert problem is None if said is None else problem is not None and said in problem and "at most 60 s" in problem


def test_a_configuration_with_an_unknown_field_is_refused_and_the_coordinator_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"name": "site-1", "store": str(tmp_path / "store"), "state": str(tmp_path / "state"), "statee": "x"}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(fields))
    assert main(["site", "start", "--config", str(tmp_path / "site.yaml")]) == 2
    assert "statee: unknown field; remove it or correct its name" in capsys.readouterr().err
    said = read_start(ObjectStore(str(tmp_path / "store")), "site-1")
    assert said.startswith("refused ") and "statee: unknown field" in said


REFUSED = {
    "data": (
        {"data": ["/nowhere/images"]},
        "data: found '/nowhere/images', expected a file or folder that can be read",
    ),
    "key": ({"key": "key"}, "key: found 'ed25519:"),
    "a server": ({}, f"api_url: found {NOWHERE!r}, expected a Prefect API that answers"),
}


@pytest.mark.parametrize(("fields", "said"), REFUSED.values(), ids=REFUSED)
def test_what_keeps_a_worker_from_starting_is_said_there_and_to_the_coordinator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], said: str
) -> None:
    """Data that cannot be read, a key that the federation does not know, a server that does not answer."""
    if "key" in fields:
        fields = {"key": str(tmp_path / "own")}
        pinned = PrivateKey.create(tmp_path / "pinned").public, PrivateKey.create(tmp_path / "own").public
        sites = [FederationSite(name="site-1", key=pinned[0])]
        publish_federation(ObjectStore(str(tmp_path / "store")), Federation(sites=sites))
    here = config(tmp_path, **fields).model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(here))
    assert main(["site", "start", "--config", str(tmp_path / "site.yaml"), "--wait", "0"]) == 2
    assert said in capsys.readouterr().err
    told = read_start(ObjectStore(str(tmp_path / "store")), "site-1")
    assert told.startswith("refused ") and said[:60] in told


def test_a_site_of_which_nothing_came_is_excluded_with_what_it_said_of_its_start(
    prefect_api: PrefectServer, tmp_path: Path
) -> None:
    """Its worker is there, and yet its flow run is never over; one that found nothing wrong said nothing."""
    store = ObjectStore(str(tmp_path / "store"))
    report_start(config(tmp_path), ["clock: found this machine's 3600 s behind"], starts=True)
    report_start(config(tmp_path, name="site-2"), [], starts=True)
    journal = start_run(store, "silent", recipe(timeouts={"round_deadline": 1}), ["site-1", "site-2"])
    step = next_step(journal, journal.recipe())
    assert step is not None
    plan, opening = open_round(journal, step)
    sites, log = {site: Watched(1, None) for site in plan.tasks}, logging.getLogger(__name__)
    with SyncPrefectClient(api=prefect_api.url) as client:
        collector = Collector(journal, plan, opening, journal.recipe(), client, log, sites, Origin(uuid4(), None))
        with pytest.raises(QuorumLost):
            collector.run()
    closing = journal.closing(plan, opening.number)
    assert closing is not None and closing.excluded["site-2"] == "no update by the deadline"
    why = closing.excluded["site-1"]
    assert why.startswith("no update by the deadline; its last start: started ") and "3600 s behind" in why


def test_what_a_site_says_is_shown_within_bounds(tmp_path: Path) -> None:
    """It may be long, hostile, or no record at all."""
    here, store = config(tmp_path), ObjectStore(str(tmp_path / "store"))
    report_start(here, ["\x1b[31m" + "x" * 9999], starts=True)
    said = read_start(store, "site-1")
    assert said.startswith("started ") and len(said) < 400 and said.isprintable()
    report_start(here, [], starts=True)
    assert read_start(store, "site-1") == ""
    store.put("sites/site-1/_start.json", b"{}" * 9, mode="overwrite")
    assert read_start(store, "site-1") == ""


def test_a_second_worker_of_a_site_is_refused_and_seen_at_the_coordinator(
    prefect_api: PrefectServer, tmp_path: Path
) -> None:
    """On this machine by its lock, on another by its heartbeats; `fedflow sites` shows what the refused one said."""
    federation = Federation(sites=[FederationSite(name="doubled")], store=str(tmp_path / "store"), name="doubled")
    here = config(tmp_path, name="doubled", api_url=prefect_api.url)
    with SyncPrefectClient(api=prefect_api.url) as client:
        assert found(here).keys() == {"pool"}
        deploy_federation(client, federation)
        assert found(here) == {}
        with held(worker_lock(prefect_api.url, "doubled")):
            text, then = found(here)["name"]
            assert then == "stops" and "another worker of doubled on this machine, process " in text
        client.send_worker_heartbeat("doubled", "doubled@elsewhere", heartbeat_interval_seconds=30)
        text, then = found(here)["name"]
        assert then == "waits" and "another worker of doubled on elsewhere, seen " in text
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(here.model_dump(mode="json", exclude_defaults=True)))
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump(federation.model_dump(mode="json", exclude_defaults=True)))
    start = command("site", "start", "--config", tmp_path / "site.yaml", "--wait", 0)
    refused = subprocess.run(start, env=environment(**prefect_api.env), capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "error: name: found another worker of doubled on elsewhere" in refused.stderr
    look = command("sites", "--federation", tmp_path / "federation.yaml", "--json")
    printed = subprocess.run(look, env=environment(**prefect_api.env), capture_output=True, text=True, check=True)
    (row,) = json.loads(printed.stdout)
    assert (
        row["at its start"].startswith("refused ") and "another worker of doubled on elsewhere" in row["at its start"]
    )
