"""Who aggregates elsewhere is not given up while nobody can be asked."""

from __future__ import annotations

import logging
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from fedflow.engine.aggregation import reduce_elsewhere
from fedflow.engine.shares import reduced_of, shares
from fedflow.prefect.delegation import Delegation
from fedflow.prefect.dispatch import Origin
from fedflow.recipe import Federation
from tests.builders import SITES
from tests.engine.test_elsewhere import closed


@pytest.fixture
def nobody() -> Iterator[SyncPrefectClient]:
    """A client of an API that is gone."""
    with socket.socket() as free:  # bound, so nobody else's, and not listening
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/api"
        settings = {PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}
        with temporary_settings(settings), get_client(sync_client=True) as client:
            yield client


class _Counting(logging.Handler):
    """Sets `enough` with the n-th record."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left, self.enough = n, threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.left -= 1
        if not self.left:
            self.enough.set()


def test_an_outage_of_the_api_costs_no_attempt(tmp_path: Path, nobody: SyncPrefectClient) -> None:
    """Three sites may aggregate, each is asked once; the API is asked for longer. What a site has done meanwhile counts."""
    journal, plan, closing = closed(tmp_path, schedule="swarm", attempts=1)
    (share,) = shares(plan, closing)
    counting, log = _Counting(len(SITES) + 2), logging.Logger("delegation")
    log.addHandler(counting)
    of = Delegation(journal, plan, journal.recipe(), Federation.of(3), nobody, log, Origin(uuid.uuid4(), None))
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(of.have_done(closing, [share])))
    waiting.start()
    assert counting.enough.wait(60) and waiting.is_alive(), "it has given up"
    assert [one.site for one in journal.delegations(plan, share.key)] == ["site-1"]
    reduce_elsewhere(journal, plan, closing, share, "site-1")
    waiting.join(60)
    assert found == [{}] and reduced_of(journal, share) is not None
