"""What every test may ask for: real servers, started once a session at the first test that needs them."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.servers import (
    PostgresServer,
    PrefectServer,
    S3Server,
    postgres_server,
    prefect_server,
    s3_server,
)

hypothesis.settings.register_profile(  # no test depends on how fast the machine is
    "fedflow", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("fedflow")


HERE = Path(__file__).parent
LONG = (
    "test_readme",
    "test_documents",
    "prefect/",
    "simulation/test_simulation",
    "test_sweep",
    "local/test_script",
    "test_wheel",
    "cli/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest begin first, so that no worker is left alone with one."""
    items.sort(key=lambda item: not item.path.relative_to(HERE).as_posix().startswith(LONG))


def pytest_configure(config: pytest.Config) -> None:
    """Keep Prefect away from the developer's own profile, server and home, and from the network.

    And let what tests start be interrupted: a shell's background job, and its children, ignore SIGINT.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        del os.environ[name]
    home = tempfile.TemporaryDirectory(prefix="fedflow-test-", ignore_cleanup_errors=True)
    config.add_cleanup(home.cleanup)
    os.environ |= {"PREFECT_HOME": home.name, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture
def postgres(postgresql: PostgresServer) -> str:
    """The URL of a fresh, empty database."""
    return postgresql.new_database()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def prefect_api(postgresql: PostgresServer) -> Iterator[PrefectServer]:
    """A Prefect server on PostgreSQL; a test that kills its server starts its own."""
    with prefect_server(postgresql.new_database()) as server:
        yield server
