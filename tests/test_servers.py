"""The servers that other tests rely on are real, and keep their data when they are killed."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from obstore.exceptions import AlreadyExistsError
from obstore.store import S3Store

from tests.servers import (
    PostgresServer,
    PrefectServer,
    S3Server,
    postgres_server,
    prefect_server,
    s3_server,
)

FLOW = """
from prefect import flow

@flow(name="hello")
def hello():
    return 1

hello()
"""


def run_flow(server: PrefectServer) -> None:
    subprocess.run([sys.executable, "-c", FLOW], env=os.environ | server.env, check=True, capture_output=True)


def states(server: PrefectServer) -> list[str]:
    """The states of the flow runs that the server knows."""
    runs = httpx.post(f"{server.url}/flow_runs/filter", json={}, trust_env=False).raise_for_status().json()
    return [run["state_type"] for run in runs]


def test_exactly_one_of_racing_creators_wins_on_s3(s3: S3Server) -> None:
    store = s3.store(s3.new_bucket())

    def create(i: int) -> bool:
        try:
            store.put("key", str(i).encode(), mode="create")
        except AlreadyExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(16)))
    assert won.count(True) == 1
    assert store.get("key").bytes() == str(won.index(True)).encode()


def test_new_bucket_is_empty_and_reached_through_the_environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    assert S3Store(s3.new_bucket()).list().collect() == []


def test_s3_servers_run_side_by_side_and_keep_objects_over_a_kill(s3: S3Server) -> None:
    with s3_server() as other:
        assert other.endpoint != s3.endpoint
        other.store().put("key", b"value")
        other.kill()
        assert not other.answers()
        other.restart()
        assert other.store().get("key").bytes() == b"value"
    assert s3.answers()
    assert not list(Path("/tmp").glob(f"seaweedfs-*{other.endpoint[-5:]}.sock"))


def test_postgres_databases_are_fresh_and_can_be_given_pg_trgm(postgresql: PostgresServer, postgres: str) -> None:
    assert postgres.startswith("postgresql+asyncpg://")
    assert postgresql.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", postgres) == "0"
    postgresql.execute("CREATE EXTENSION pg_trgm", postgres)
    assert postgresql.execute("SELECT similarity('round', 'round')", postgres) == "1"
    assert postgresql.new_database() != postgres


def test_postgres_keeps_rows_over_a_kill() -> None:
    with postgres_server() as server:
        server.execute("CREATE TABLE t AS SELECT 7 AS x")
        server.kill()
        server.restart()
        assert server.execute("SELECT x FROM t") == "7"


def test_a_flow_runs_against_prefect_on_postgres(prefect_api: PrefectServer) -> None:
    run_flow(prefect_api)
    assert "COMPLETED" in states(prefect_api)


@pytest.mark.faults
def test_prefect_keeps_its_flow_runs_over_a_kill() -> None:
    with prefect_server() as server:
        url = server.url
        run_flow(server)
        server.kill()
        assert not server.answers()
        server.restart()
        assert server.url == url
        assert states(server) == ["COMPLETED"]
    assert not server.running


@pytest.mark.browser
def test_the_prefect_ui_shows_a_flow(prefect_api: PrefectServer) -> None:
    from playwright.sync_api import sync_playwright

    run_flow(prefect_api)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{prefect_api.ui_url}/flows")
        page.get_by_text("hello", exact=True).first.wait_for()
        browser.close()
