"""What fedflow uses of Prefect beyond its public interface is still what it was."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import prefect.flow_engine
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


def test_prefect_s_own_objects_have_every_private_attribute_that_is_used() -> None:
    """As the source names them: `self._limiter` is a new worker's, `client._client` a new client's."""
    client = private.SiteClient("http://127.0.0.1:1/api")
    worker = private.FlowWorkerBase("a-pool")
    there = {"self": worker, "client": client, "self.client": client, "prefect": prefect}
    there |= {"client._client": client._client, "self.client._client": client._client}  # type: ignore[attr-defined]
    there |= {"flow_engine": prefect.flow_engine, "prefect.types": prefect.types}
    used = set(private_attributes(Path(private.__file__)))
    assert ("self", "_submitting_flow_run_ids") in used and ("client._client", "enable_csrf_support") in used
    assert {f"{owner}.{name}" for owner, name in used if not hasattr(there[owner], name)} == set()


def private_attributes(file: Path) -> Iterator[tuple[str, str]]:
    """(owner, name) of each attribute that is private, or one of what is, up to what a worker makes as it starts."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if (node.attr.startswith("_") and not node.attr.startswith("__")) or owner.endswith("._client"):
                yield owner, node.attr
