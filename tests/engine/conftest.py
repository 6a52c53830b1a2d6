from collections.abc import Iterator

import fsspec
import pytest

from fedflow.engine.child import warm_up

# The processes that these tests start come from one that has imported everything; it begins at once, beside the tests.
warm_up("torch._dynamo", "tests.builders")  # the first: what a first optimizer step imports


@pytest.fixture(autouse=True)
def _forget_stores_in_memory() -> Iterator[None]:
    """fsspec's memory is searched from end to end for every object."""
    yield
    fsspec.filesystem("memory").store.clear()
