"""The store over Azure Blob Storage, as far as its emulator goes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from uuid import uuid4

import pytest

from fedflow.store.objects import ObjectStore
from fedflow.testing.store import SharedStoreConformance
from tests.servers import AzureServer, azure_server

pytestmark = pytest.mark.azure


@pytest.fixture(scope="module")
def azure() -> Iterator[AzureServer]:
    with azure_server() as server:
        yield server


class TestAzure(SharedStoreConformance):
    @pytest.fixture
    def store(self, azure: AzureServer, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
        for name, value in azure.env.items():
            monkeypatch.setenv(name, value)
        return ObjectStore(f"az://{azure.container}/{uuid4().hex}")

    def test_large_objects_go_in_parts_and_come_back_whole(self, store: ObjectStore) -> None:
        data = os.urandom(70 << 20)
        ref = store.write("objects", data)
        assert store.get(ref.key) == data == store.read(ref)
