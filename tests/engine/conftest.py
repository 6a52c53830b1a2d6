"""The processes that these tests start come from one that has imported everything; it begins at once, beside the tests."""

from fedflow.engine.child import warm_up

warm_up("torch._dynamo", "tests.builders")  # the first: what a first optimizer step imports
