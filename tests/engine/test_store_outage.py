"""An S3 server that is gone while it is needed: waited for, or a clear error of a run that can be resumed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fedflow.errors import FedflowError
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.testing.faults import Fault, fail_at
from tests.builders import bits, in_child, recipe, run
from tests.servers import S3Server, s3_server

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

FIELDS: dict[str, Any] = {"algorithm": {"kind": "tests.builders:Leaning"}, "rounds": 2}
OUTAGE = 30  # seconds
PLACES = {  # what comes next needs the server
    "download": ("opening", "after"),
    "upload": ("update objects", "before"),
    "commit": ("manifest", "before"),
}


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


def stopped_at(place: str, token: Path) -> Fault:
    """Two seconds before the process goes on with `place` in round 1: time to stop the server."""
    step, when = PLACES[place]
    return fail_at(step, round=1, when=when, effect="slow", seconds=2, token=token)  # type: ignore[arg-type]


def run_into(fault: Fault, fields: dict[str, Any], url: str, options: dict[str, Any], report: str) -> None:
    """For `in_child`."""
    fault.arm()
    try:
        run(recipe(**fields), url, store_options=options, state=f"{report}-states")
    except FedflowError as error:
        Path(report).write_text(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("place", PLACES)
def test_an_outage_of_thirty_seconds_is_waited_out(s3: S3Server, tmp_path: Path, place: str) -> None:
    url, token, report = f"s3://{s3.bucket}/outage", tmp_path / "token", tmp_path / "report"
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(in_child, run_into, stopped_at(place, token), FIELDS, url, s3.options, str(report))
        awaited(token, done)
        s3.kill()
        time.sleep(OUTAGE)
        s3.restart()
        assert done.result() == 0 and not report.exists(), report.read_text()
    assert bits(Journal(ObjectStore(url, s3.options), "run")) == bits(run(recipe(**FIELDS)))


@pytest.mark.parametrize("place", PLACES)
def test_a_longer_one_than_the_limit_is_told_and_the_run_goes_on_when_it_is_back(
    s3: S3Server, tmp_path: Path, place: str
) -> None:
    fields = {**FIELDS, "timeouts": {"transfer_timeout": "5s"}}
    options = {**s3.options, "retry_config": {"retry_timeout": 5}}
    url, token, report = f"s3://{s3.bucket}/outage", tmp_path / "token", tmp_path / "report"
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(in_child, run_into, stopped_at(place, token), fields, url, options, str(report))
        awaited(token, done)
        s3.kill()
        assert done.result() == 0
    told = report.read_text()
    assert told.startswith("StoreUnavailable: ") and url in told and "try again" in told
    s3.restart()
    journal = run(recipe(**fields), url, store_options=s3.options, state=f"{report}-states")
    assert bits(journal) == bits(run(recipe(**FIELDS)))


def awaited(token: Path, done: Any) -> None:
    while not token.exists():
        assert not done.done()
        time.sleep(0.02)
