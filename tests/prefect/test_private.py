"""What fedflow uses of Prefect beyond its public interface is still what it was."""

from __future__ import annotations

import pytest

from fedflow.prefect import private


def test_prefect_has_what_is_wrapped() -> None:
    """Where this fails, a new version of Prefect changed something that fedflow/prefect/private.py builds upon."""
    assert private.changed() == {}


def test_what_is_missing_or_otherwise_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "prefect.flow_engine:_send_heartbeats"
    monkeypatch.setattr("prefect.flow_engine._send_heartbeats", lambda engine, frequency: None)
    assert private.changed() == {name: "(engine, frequency)"}
    monkeypatch.delattr("prefect.flow_engine._send_heartbeats")
    assert private.changed() == {name: "missing"}
