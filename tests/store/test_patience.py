"""A server that takes requests and never answers: nobody waits for it for ever."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import timedelta

import pytest

from fedflow.errors import StoreUnavailable
from fedflow.store.objects import ObjectStore


@pytest.fixture
def mute() -> Iterator[str]:
    """The endpoint of a server that is connected to and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_transfer_in_which_nothing_happens_is_given_up(mute: str) -> None:
    options = {"endpoint": mute, "access_key_id": "a", "secret_access_key": "b"}
    store = ObjectStore("s3://bucket/below", options).child("it").patient(timedelta(seconds=0.3))
    assert store.url == "s3://bucket/below/it"
    for use in (lambda: store.get("a"), lambda: store.put("a", b"1"), lambda: store.write_stream("a", [b"1"])):
        with pytest.raises(StoreUnavailable, match="s3://bucket/below/it: cannot .* 'a'.*try again"):
            use()


def test_elsewhere_patience_changes_nothing() -> None:
    store = ObjectStore("memory://patient")
    store.patient(timedelta(seconds=1)).put("a", b"1")
    assert store.get("a") == b"1"
